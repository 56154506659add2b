//! The scenarios of shadow paging: a guest that changes the tables that it runs on, beside the host and beside itself.
//!
//! The guest runs in PAE format, whose three levels are the fewest, with two entries a table. Its pages:
//!
//! | page | leads to |
//! |---|---|
//! | 0, 1 | the two frames of data, by entries 0 and 1 of the table |
//! | 2, 3 | the same by the same table, below an entry of the directory that does not let it write |
//! | 4, 5 | the table, and the directory, as the guest writes them |
//!
//! A second root leads to the same tables. Under a third, pages 0 and 1 are a large one: the frames of the table and of the
//! directory of pages 4 and 5; and pages 2 and 3 are another: those of the first root and of the directory of pages 0 to 3. (A
//! large page has as many frames as a table has entries.)
//!
//! Each is small enough for loom, and is repeated under shuttle. What must hold is the same in all: no access reaches
//! what its CPU may not know of any more, nor memory that was taken away, and in the end everything agrees.

/// A frame that entries lead to, and their marks: P, W, U, A, D.
const fn entry(frame: u64) -> u64 {
    frame << 12 | 0x67
}

/// The same, not writable.
const fn read_only(frame: u64) -> u64 {
    entry(frame) & !2
}

/// Guest frames: two of data, then the tables.
pub const ROOT: u64 = 2;
/// The directory of pages 0 to 3.
pub const DIRECTORY: u64 = 3;
/// The table of pages 0 to 3.
pub const TABLE: u64 = 4;
/// The directory and the table of pages 4 and 5.
pub const WINDOW: [u64; 2] = [5, 6];
/// The other root.
pub const OTHER: u64 = 7;
/// The root with a large page, and its directory.
pub const LARGE: [u64; 2] = [8, 9];
/// Frames of the one slot.
pub const FRAMES: u64 = 10;
/// In an entry of a directory: it leads to a large page.
pub const LARGE_PAGE: u64 = 1 << 7;

/// The guest's tables at first, as (frame, entry, value).
pub const TABLES: [(u64, u64, u64); 14] = [
    (ROOT, 0, DIRECTORY << 12 | 1),
    (ROOT, 1, WINDOW[0] << 12 | 1),
    (OTHER, 0, DIRECTORY << 12 | 1),
    (OTHER, 1, WINDOW[0] << 12 | 1),
    (DIRECTORY, 0, entry(TABLE)),
    (DIRECTORY, 1, read_only(TABLE)),
    (TABLE, 0, entry(0)),
    (TABLE, 1, entry(1)),
    (WINDOW[0], 0, entry(WINDOW[1])),
    (WINDOW[1], 0, entry(TABLE)),
    (WINDOW[1], 1, entry(DIRECTORY)),
    (LARGE[0], 0, LARGE[1] << 12 | 1),
    (LARGE[1], 0, entry(TABLE) | LARGE_PAGE),
    (LARGE[1], 1, entry(ROOT) | LARGE_PAGE),
];

/// An entry that the guest writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// The page through which it does.
    pub page: u64,
    /// Which of the two entries.
    pub entry: u64,
    /// What it becomes.
    pub value: u64,
}

/// What a thread of a scenario does, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Do {
    /// The guest reads a page.
    Read(u64),
    /// The guest writes a page.
    Write(u64),
    /// The guest writes an entry.
    Set(Written),
    /// The guest loads CR3 with the value that it has; the first root at first.
    Reload,
    /// The guest loads CR3 with this root.
    Load(u64),
    /// The guest forgets one page.
    Invlpg(u64),
    /// The host zaps the data.
    Zap,
    /// The host zaps everything.
    ZapAll,
    /// The host moves the memory of a guest frame elsewhere, under an invalidation.
    Move(u64),
    /// The host deletes the slot.
    Delete,
}

impl ShadowScenario {
    /// Whether its pages are so few that some have to go for others.
    pub const fn is_tight(&self) -> bool {
        self.pages < 32
    }
}

impl Do {
    /// Whether a vCPU does it.
    pub const fn is_guest(self) -> bool {
        matches!(self, Self::Read(_) | Self::Write(_) | Self::Set(_) | Self::Reload | Self::Load(_) | Self::Invlpg(_))
    }
}

/// See the module head.
#[derive(Clone, Copy, Debug)]
pub struct ShadowScenario {
    /// For reports.
    pub name: &'static str,
    /// Shadow pages at most.
    pub pages: u32,
    /// The backing has every frame at hand, so that faults map neighbours (where there are any: not under loom).
    pub at_hand: bool,
    /// The backing tells of what one large leaf could map in one answer.
    pub whole: bool,
    /// What a vCPU has done before.
    pub before: &'static [Do],
    /// The threads; the last runs on the main thread.
    pub threads: &'static [&'static [Do]],
}

use Do::{Delete, Invlpg, Load, Move, Read, Reload, Set, Write, Zap, ZapAll};

/// Page 0 leads to the other frame.
const REMAP: Do = Set(Written { page: 4, entry: 0, value: entry(1) });
/// The same, by the large page of the third root.
const REMAP_BY_LARGE: Do = Set(Written { page: 0, entry: 0, value: entry(1) });
/// It leads to the first again.
const MAP_BACK: Do = Set(Written { page: 4, entry: 0, value: entry(0) });
/// Page 0 can not be written.
const PROTECT: Do = Set(Written { page: 4, entry: 0, value: read_only(0) });
/// Pages 0 and 1 are gone.
const UNLINK_FIRST: Do = Set(Written { page: 5, entry: 0, value: 0 });
/// They are there.
const LINK_FIRST: Do = Set(Written { page: 5, entry: 0, value: entry(TABLE) });
/// The same, by a large page of the third root.
const LINK_FIRST_BY_LARGE: Do = Set(Written { page: 3, entry: 0, value: entry(TABLE) });
/// Pages 2 and 3 are gone.
const UNLINK: Do = Set(Written { page: 5, entry: 1, value: 0 });
/// They are there, and not to be written.
const LINK: Do = Set(Written { page: 5, entry: 1, value: read_only(TABLE) });
/// They are the same as pages 0 and 1.
const LINK_WRITABLE: Do = Set(Written { page: 5, entry: 1, value: entry(TABLE) });

const fn scenario(name: &'static str, before: &'static [Do], threads: &'static [&'static [Do]]) -> ShadowScenario {
    ShadowScenario { name, pages: 32, at_hand: false, whole: false, before, threads }
}

/// One in which there are large leaves.
const fn large(name: &'static str, before: &'static [Do], threads: &'static [&'static [Do]]) -> ShadowScenario {
    ShadowScenario { whole: true, ..scenario(name, before, threads) }
}

/// All of them.
pub const SHADOW_SCENARIOS: &[ShadowScenario] = &[
    scenario("shadow faults in one table", &[Read(4)], &[&[Read(0)], &[Read(1)]]),
    scenario("shadow faults of one page", &[Read(4)], &[&[Write(0)], &[Write(0)]]),
    scenario("shadow faults in different tables", &[Read(0)], &[&[Read(4)], &[Read(2)]]),
    scenario("shadow faults in a new guest", &[], &[&[Read(0)], &[Read(4)]]),
    scenario("one table in two roles", &[Write(0), Read(2)], &[&[Read(2), Write(2)], &[Write(0)]]),
    scenario("unsync beside sync", &[Read(0), Read(4)], &[&[REMAP, Reload, Read(0)], &[Reload, Read(0)]]),
    scenario(
        "unsync beside unsync",
        &[Read(0), Read(4)],
        &[&[REMAP, Reload, Read(0)], &[MAP_BACK, Invlpg(0), Read(0)]],
    ),
    scenario("sync beside writes that go on", &[Read(0), MAP_BACK], &[&[REMAP, Reload, Read(0)], &[Reload, Read(0)]]),
    scenario("fault beside sync", &[Write(4), Read(1)], &[&[Read(0)], &[REMAP, Reload, Read(0)]]),
    scenario("INVLPG beside writes", &[Read(0), MAP_BACK], &[&[REMAP, Invlpg(0), Read(0)], &[Invlpg(0), Read(0)]]),
    scenario("a table becomes writable twice", &[Read(0), Read(4)], &[&[Write(4)], &[REMAP, Reload, Read(0)]]),
    scenario("write-protect beside becoming writable", &[Read(4)], &[&[Read(0)], &[REMAP, Reload, Read(0)]]),
    scenario("a leaf of another frame", &[PROTECT, Reload, Read(0)], &[&[MAP_BACK, REMAP, Write(0)], &[Zap]]),
    scenario(
        "link of what is out of step",
        &[Read(0), UNLINK, Reload],
        &[&[REMAP, LINK_WRITABLE, Read(3), Read(2)], &[Reload, Read(2)]],
    ),
    scenario("link beside sync of what is below", &[Read(0), UNLINK, REMAP], &[&[LINK, Read(2)], &[Reload, Read(0)]]),
    scenario(
        "writes below a link that stays",
        &[Read(0), Read(4), UNLINK_FIRST],
        &[&[Load(LARGE[0]), REMAP_BY_LARGE, LINK_FIRST_BY_LARGE], &[Read(0)]],
    ),
    scenario(
        "link of a table that is being opened",
        &[Read(0), UNLINK_FIRST, Reload, LINK_FIRST, Reload],
        &[&[Load(LARGE[0]), REMAP_BY_LARGE], &[Read(4)], &[Read(0), Reload, Read(0)]],
    ),
    scenario(
        "load of a root beside link below it",
        &[Load(OTHER), Read(0), Read(4)],
        &[&[Load(OTHER), REMAP, Load(ROOT), Read(0)], &[Read(0)]],
    ),
    scenario(
        "link of a table that is out of step",
        &[Read(0), UNLINK_FIRST, Reload, MAP_BACK, Reload],
        &[&[LINK_FIRST, Read(0)], &[REMAP, Reload, Read(0)]],
    ),
    scenario(
        "links that make a way together",
        &[Load(OTHER), Read(0), UNLINK_FIRST, Reload, LINK_FIRST, Reload],
        &[&[Load(OTHER), REMAP, Load(ROOT), Read(0)], &[Load(OTHER), Read(0)], &[Read(0)]],
    ),
    scenario(
        "INVLPG beside link",
        &[Load(OTHER), Read(0), Read(4)],
        &[&[Read(4), REMAP, Invlpg(0), Read(0)], &[Read(0)]],
    ),
    scenario(
        "loads of two roots beside writes",
        &[Read(0), MAP_BACK, Load(OTHER), Read(0)],
        &[&[REMAP, Load(OTHER), Read(0), Load(ROOT), Read(0)], &[Load(OTHER), Read(0), MAP_BACK, Load(ROOT), Read(0)]],
    ),
    large(
        "large leaf beside link of a table under it",
        &[],
        &[&[Load(LARGE[0]), REMAP_BY_LARGE, Load(ROOT), Read(0)], &[Read(0)]],
    ),
    large("large leaf beside invalidation of a part", &[], &[&[Load(LARGE[0]), Read(1), Read(0)], &[Move(TABLE)]]),
    large("large leaf beside zap-all", &[], &[&[Load(LARGE[0]), Write(1), Write(0)], &[ZapAll, Move(TABLE)]]),
    scenario(
        "loads of two roots beside invalidation",
        &[Load(OTHER), Read(0), Read(4)],
        &[&[Read(0), Load(OTHER), Read(0), Load(ROOT), Read(0)], &[Move(0)]],
    ),
    scenario(
        "reload beside sync",
        &[Read(0), MAP_BACK],
        &[&[Read(0), Reload, Read(0)], &[REMAP, Reload, MAP_BACK, Reload]],
    ),
    scenario(
        "reload, sync and zap",
        &[Read(0), MAP_BACK],
        &[&[Read(0), Reload, Read(0)], &[REMAP, Reload, MAP_BACK, Reload], &[Zap]],
    ),
    scenario("zap beside link", &[Read(4)], &[&[Read(0)], &[Move(TABLE)]]),
    scenario("zap of a directory beside link", &[Read(4), Read(2)], &[&[Read(0)], &[Move(DIRECTORY)]]),
    scenario("zap of the root beside fault", &[Read(0)], &[&[Read(4)], &[Move(ROOT)]]),
    scenario("shadow fault beside invalidation", &[Read(4)], &[&[Read(0)], &[Move(0)]]),
    ShadowScenario {
        at_hand: true,
        ..scenario("neighbours beside invalidation", &[Read(4)], &[&[Read(0), Read(1)], &[Move(1)]])
    },
    scenario("shadow guest beside invalidation", &[Read(0)], &[&[Read(0), Read(0)], &[Move(0)]]),
    scenario("sync beside invalidation of a table", &[Read(0), MAP_BACK], &[&[REMAP, Reload, Read(0)], &[Move(TABLE)]]),
    scenario("shadow fault beside slot delete", &[Read(4)], &[&[Read(0)], &[Delete]]),
    scenario("shadow fault beside zap-all", &[Read(4)], &[&[Read(0)], &[ZapAll]]),
    scenario("shadow root load beside zap-all", &[Read(0)], &[&[Reload, Read(0)], &[ZapAll, Move(0)]]),
    scenario("unsync beside zap-all", &[Read(0), Read(4)], &[&[REMAP, Reload, Read(0)], &[ZapAll]]),
    scenario("zap-all beside zap-all, of shadow pages", &[Read(0)], &[&[ZapAll], &[ZapAll]]),
    scenario(
        "sync, sync and writes",
        &[Read(0), MAP_BACK],
        &[&[REMAP], &[Reload, Read(0)], &[MAP_BACK, Reload, Read(0)]],
    ),
    scenario("fault, unsync and invalidation", &[Read(4)], &[&[Read(0)], &[REMAP, Reload, Read(0)], &[Move(0)]]),
    ShadowScenario {
        name: "quota beside fault",
        pages: 14,
        at_hand: false,
        whole: false,
        before: &[Read(0), Read(2)],
        threads: &[&[Read(4)], &[Read(2), Read(0)]],
    },
    ShadowScenario {
        name: "quota beside unsync",
        pages: 14,
        at_hand: false,
        whole: false,
        before: &[Read(0), Read(4)],
        threads: &[&[REMAP, Reload, Read(0)], &[Read(2)]],
    },
];
