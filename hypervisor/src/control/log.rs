//! Lines for people, as messages of the control channel.

use alloc::string::ToString;
use core::fmt;

use nestling_control::message::{LogLevel, ToCommand};

use super::{Urgency, queue_message};

/// Queues a line; it is dropped (and counted) when the queue is nearly full.
pub fn write(level: LogLevel, text: fmt::Arguments<'_>) {
    queue_message(&ToCommand::Log { level, text: text.to_string() }, Urgency::Log);
}

macro_rules! info {
    ($($argument:tt)*) => {
        $crate::control::log::write(nestling_control::message::LogLevel::Info, format_args!($($argument)*))
    };
}

macro_rules! warning {
    ($($argument:tt)*) => {
        $crate::control::log::write(nestling_control::message::LogLevel::Warn, format_args!($($argument)*))
    };
}

pub(crate) use {info, warning};
