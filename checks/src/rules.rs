//! The rules that the library's types carry: each has a program that breaks it, in `checks/rules`, and the message with
//! which the compiler refuses that. `tests/rules.rs` compiles them.

/// A rule that can not be broken by a program that compiles.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// The program's name: a file of `checks/rules`.
    pub name: &'static str,
    /// The program. Its head says the rule.
    pub program: &'static str,
    /// What the compiler says of it.
    pub message: &'static str,
}

impl Rule {
    /// The first line of what the compiler says.
    pub fn error(&self) -> &'static str {
        self.message.lines().next().unwrap_or_default()
    }
}

macro_rules! rules {
    ($($name:ident,)*) => {
        /// All of them.
        pub const RULES: &[Rule] = &[$(Rule {
            name: stringify!($name),
            program: include_str!(concat!("../rules/", stringify!($name), ".rs")),
            message: include_str!(concat!("../rules/", stringify!($name), ".stderr")),
        },)*];
    };
}

rules! {
    all_roots_from_the_shared_side,
    all_roots_out_of_nothing,
    defunct_roots_emptied_twice,
    defunct_roots_left_alone,
    defunct_roots_put_before_they_are_empty,
    entry_frozen_after_the_hold,
    entry_frozen_outside_a_hold,
    entry_read_after_leaving,
    entry_read_without_the_mark,
    entry_stored_to,
    entry_thawed_before_its_flush,
    fault_handled_in_guest_mode,
    flush_claimed_needless_on_live_roots,
    flush_proved_twice,
    guard_sent_to_another_thread,
    guest_frame_taken_for_a_host_frame,
    hold_begun_without_its_end,
    hold_forgotten_with_its_debts,
    inside_twice,
    page_armed_without_a_debt,
    range_given_back_at_once,
    roots_invalidated_on_the_shared_side,
    roots_marked_invalid_without_the_request,
    shadow_answer_kept_over_a_zap,
    shadow_page_locked_under_a_bucket,
    shadow_page_made_without_a_fresh_answer,
    slot_finished_after_a_zap_of_valid_roots,
    slot_finished_without_a_zap,
    slot_read_after_leaving,
    slot_set_freed_before_a_grace_period,
    table_freed_before_its_flush,
    tree_freed_beside_readers,
    walk_continued_after_a_yield,
}
