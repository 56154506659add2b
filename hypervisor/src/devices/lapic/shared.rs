//! What other CPUs may write of a vCPU's local APIC.
//!
//! Posting sets the vector's bit first and the summary bit in `events` second; draining clears them in the same order
//! reversed (summary first). So a drain that misses a vector leaves the summary set for the next one, and a vector is
//! never left behind with the summary clear. An INIT forgets a start-up IPI posted before it, which the vCPU would have
//! ignored or acted on; one posted after it counts, so of the pair that a drain returns the INIT came first.
//!
//! All operations on `events` are sequentially consistent because the other half of the agreement, the flag that says
//! whether the vCPU is in guest mode, lives elsewhere (see the head of [`super`]).

use core::sync::atomic::{AtomicU32, Ordering};

use super::ipi::{Addressing, IpiKind};

const EVENT_VECTORS: u32 = 1 << 0;
const EVENT_NMI: u32 = 1 << 1;
const EVENT_INIT: u32 = 1 << 2;
const EVENT_STARTUP: u32 = 1 << 3;
/// Another NMI was posted behind [`EVENT_NMI`].
const EVENT_SECOND_NMI: u32 = 1 << 4;
/// The machine has lost its power ([`LapicShared::post_power_loss`]), and is to go on where its sleep ends.
const EVENT_POWER_LOSS: u32 = 1 << 5;
const EVENT_RESUME: u32 = 1 << 6;
const STARTUP_SHIFT: u32 = 8;

/// What has been posted that is not a vector. An INIT comes before a start-up IPI in the same value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Pending {
    /// Non-maskable interrupts: 0, 1, or 2, which stands for more too.
    pub nmis: u8,
    /// INIT.
    pub init: bool,
    /// A start-up IPI with its vector.
    pub startup: Option<u8>,
    /// The vCPU is as after power-on. Comes before all others, and then nothing is left of vectors.
    pub power_loss: bool,
    /// Where a machine that slept goes on, it does so here.
    pub resume: bool,
}

/// The half of a local APIC that any CPU may write.
#[derive(Debug)]
#[repr(align(64))]
pub struct LapicShared {
    vectors: [AtomicU32; 8],
    /// Which of them are level-triggered: set before the vector, and taken only together with it.
    levels: [AtomicU32; 8],
    /// [`Addressing`], for senders.
    addressing: AtomicU32,
    events: AtomicU32,
    id: u32,
}

impl LapicShared {
    /// Nothing is posted.
    pub const fn new(apic_id: u32) -> Self {
        let addressing = AtomicU32::new(Addressing::X2Apic.to_word());
        let (vectors, levels) = ([const { AtomicU32::new(0) }; 8], [const { AtomicU32::new(0) }; 8]);
        Self { vectors, levels, addressing, events: AtomicU32::new(0), id: apic_id }
    }

    /// The APIC's ID, which never changes.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Posts what a command that [`super::route`] has addressed to this vCPU sends. Returns whether the vCPU must be kicked; if not,
    /// somebody else's kick is already on its way.
    pub fn post(&self, kind: IpiKind) -> bool {
        match kind {
            IpiKind::Fixed(vector) | IpiKind::LowestPriority(vector) => self.post_vector(vector),
            IpiKind::Nmi => self.post_nmi(),
            IpiKind::Init => {
                let kept = EVENT_VECTORS | EVENT_NMI | EVENT_SECOND_NMI | EVENT_POWER_LOSS | EVENT_RESUME;
                let update = |events: u32| Some(events & kept | EVENT_INIT);
                let before = self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update);
                before.unwrap_or_else(|events| events) & EVENT_INIT == 0
            }
            IpiKind::Startup(vector) => {
                let update = |events: u32| {
                    // Of several, the first counts: the vCPU has left the waiting state by the second.
                    let new = EVENT_STARTUP | u32::from(vector) << STARTUP_SHIFT;
                    (events & EVENT_STARTUP == 0).then_some(events | new)
                };
                self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update).is_ok()
            }
        }
    }

    /// Posts a vector. Returns whether the vCPU must be kicked.
    pub fn post_vector(&self, vector: u8) -> bool {
        let bit = 1 << (vector & 31);
        self.vectors[usize::from(vector >> 5)].fetch_or(bit, Ordering::SeqCst);
        self.post_event(EVENT_VECTORS)
    }

    /// Posts a level-triggered vector. Returns whether the vCPU must be kicked.
    pub fn post_level(&self, vector: u8) -> bool {
        self.levels[usize::from(vector >> 5)].fetch_or(1 << (vector & 31), Ordering::SeqCst);
        self.post_vector(vector)
    }

    /// The machine goes to sleep, and the vCPU loses its power. What was posted before is forgotten.
    pub fn post_power_loss(&self) -> bool {
        self.events.swap(EVENT_POWER_LOSS | EVENT_VECTORS, Ordering::SeqCst) & EVENT_POWER_LOSS == 0
    }

    /// The machine wakes, by this vCPU. Behind the power loss.
    pub fn post_resume(&self) -> bool {
        self.post_event(EVENT_RESUME)
    }

    /// How logical destinations find this APIC.
    pub fn addressing(&self) -> Addressing {
        Addressing::from_word(self.addressing.load(Ordering::Relaxed))
    }

    pub(super) fn set_addressing(&self, addressing: Addressing) {
        self.addressing.store(addressing.to_word(), Ordering::Relaxed);
    }

    /// Whether there is anything for [`super::Lapic::sync`] to take in.
    pub fn has_pending(&self) -> bool {
        self.events.load(Ordering::SeqCst) != 0
    }

    /// Two are told apart: a vCPU that handles none takes the first and keeps the second.
    fn post_nmi(&self) -> bool {
        let update = |events: u32| Some(events | EVENT_NMI | (events & EVENT_NMI) * (EVENT_SECOND_NMI / EVENT_NMI));
        let before = self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update);
        before.unwrap_or_else(|events| events) & EVENT_NMI == 0
    }

    fn post_event(&self, event: u32) -> bool {
        self.events.fetch_or(event, Ordering::SeqCst) & event == 0
    }

    /// Empties the shared half: each vector goes to `accept` with whether it is level-triggered, the rest is returned. For the vCPU's own thread.
    pub(super) fn drain(&self, mut accept: impl FnMut(u8, bool)) -> Pending {
        // The common case, on each entry, is a load of a line that nobody is writing.
        if !self.has_pending() {
            return Pending::default();
        }
        let events = self.events.swap(0, Ordering::SeqCst);
        if events & EVENT_VECTORS != 0 {
            for (index, word) in self.vectors.iter().enumerate() {
                let mut bits = word.swap(0, Ordering::SeqCst);
                let levels = if bits == 0 { 0 } else { self.levels[index].fetch_and(!bits, Ordering::SeqCst) };
                while bits != 0 {
                    let bit = bits.trailing_zeros();
                    accept((index as u8) << 5 | bit as u8, levels & 1 << bit != 0);
                    bits &= bits - 1;
                }
            }
        }
        Pending {
            nmis: u8::from(events & EVENT_NMI != 0) + u8::from(events & EVENT_SECOND_NMI != 0),
            init: events & EVENT_INIT != 0,
            startup: (events & EVENT_STARTUP != 0).then_some((events >> STARTUP_SHIFT) as u8),
            power_loss: events & EVENT_POWER_LOSS != 0,
            resume: events & EVENT_RESUME != 0,
        }
    }
}
