//! The test exit port: a guest that writes `value` to it ends, and the machine's exit status is `value << 1 | 1`.
//!
//! The status is odd so that a guest can never claim the 0 that stands for an orderly power-off by this port.

/// The port.
pub const DEBUG_EXIT: u16 = 0xf4;

/// The machine's exit status for a written value.
pub const fn exit_status(value: u32) -> u32 {
    value << 1 | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_odd_and_carries_the_value() {
        assert_eq!(exit_status(0), 1);
        assert_eq!(exit_status(0x10), 0x21);
        assert_eq!(exit_status(u32::MAX), u32::MAX);
    }
}
