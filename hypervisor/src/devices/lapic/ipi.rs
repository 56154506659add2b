//! Interprocessor interrupts: what a write to ICR means and whom it reaches.

use super::LapicShared;
use crate::devices::Gp;
use crate::devices::ioapic::Message;

/// The most vCPUs that a VM can have; their APIC IDs stay below the xAPIC broadcast ID, so that the 8-bit entries of the
/// MADT can name them all.
pub const MAX_VCPUS: usize = 255;

/// In x2APIC mode all ones is the broadcast destination, physical and logical.
const BROADCAST: u32 = u32::MAX;

const LEVEL_ASSERT: u64 = 1 << 14;
const TRIGGER_LEVEL: u64 = 1 << 15;
const LOGICAL: u64 = 1 << 11;
/// Vector, delivery and destination mode, level, trigger mode, shorthand, destination. Bit 12, delivery status, doesn't
/// exist in x2APIC mode.
const VALID: u64 = 0xffff_ffff_000c_cfff;

/// As [`VALID`], of the lower half in xAPIC mode, where bits that don't exist are ignored.
pub(super) const XAPIC_VALID: u32 = 0x000c_cfff;
/// In xAPIC mode this is the broadcast destination.
const XAPIC_BROADCAST: u8 = 0xff;

/// How an APIC is found by logical destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressing {
    /// By the logical ID that follows from its ID.
    X2Apic,
    /// By the bits of its logical ID.
    Flat(u8),
    /// By cluster in the upper four bits and bits in the lower four.
    Cluster(u8),
}

impl Addressing {
    pub(super) const fn to_word(self) -> u32 {
        match self {
            Self::X2Apic => 0,
            Self::Flat(id) => 1 << 8 | id as u32,
            Self::Cluster(id) => 2 << 8 | id as u32,
        }
    }

    pub(super) const fn from_word(word: u32) -> Self {
        match word >> 8 {
            0 => Self::X2Apic,
            1 => Self::Flat(word as u8),
            _ => Self::Cluster(word as u8),
        }
    }

    /// Whether a logical destination of eight bits means the APIC with this ID.
    const fn matches(self, to: u8, id: u32) -> bool {
        match self {
            // A destination of eight bits is one of cluster 0.
            Self::X2Apic => id < 16 && logical_id(id) & to as u32 != 0,
            Self::Flat(mine) => mine & to != 0,
            Self::Cluster(mine) => (to >> 4 == 0xf || mine >> 4 == to >> 4) && mine & to & 0xf != 0,
        }
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpiKind {
    /// An interrupt vector.
    Fixed(u8),
    /// An interrupt vector, to one of the vCPUs addressed.
    LowestPriority(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// INIT: the vCPU is reset and waits for a start-up IPI.
    Init,
    /// A start-up IPI with its vector: the vCPU begins at physical address `vector << 12`.
    Startup(u8),
}

/// Whom it is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The sender.
    Myself,
    /// All vCPUs, the sender too.
    All,
    /// All vCPUs but the sender.
    Others,
    /// The vCPU with this APIC ID, or all.
    Physical(u32),
    /// The vCPUs of cluster 31:16 whose bits are set in 15:0, or all.
    Logical(u32),
    /// The vCPUs that this logical destination of eight bits means, each by its own [`Addressing`].
    Logical8(u8),
}

/// A command written to ICR, for [`route`] and [`super::LapicShared::post`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpiCommand {
    /// What is sent.
    pub kind: IpiKind,
    /// Whom it is sent to.
    pub destination: Destination,
}

/// Decodes ICR. `None`: the write is legal and nothing is sent.
pub(super) fn decode(icr: u64) -> Result<Option<IpiCommand>, Gp> {
    if icr & !VALID != 0 {
        return Err(Gp);
    }
    Ok(command(icr, || match (icr >> 32) as u32 {
        id if icr & LOGICAL != 0 => Destination::Logical(id),
        id => Destination::Physical(id),
    }))
}

/// Decodes ICR in xAPIC mode, its halves joined.
pub(super) fn decode_xapic(icr: u64) -> Option<IpiCommand> {
    command(icr, || destination8((icr >> 56) as u8, icr & LOGICAL != 0))
}

fn destination8(id: u8, logical: bool) -> Destination {
    match id {
        XAPIC_BROADCAST => Destination::All,
        id if logical => Destination::Logical8(id),
        id => Destination::Physical(u32::from(id)),
    }
}

impl Message {
    /// The command that carries the message; `None` if no local APIC takes such a one.
    #[must_use]
    pub fn command(&self) -> Option<IpiCommand> {
        let kind = match self.mode {
            0 => IpiKind::Fixed(self.vector),
            1 => IpiKind::LowestPriority(self.vector),
            4 => IpiKind::Nmi,
            5 => IpiKind::Init,
            _ => return None,
        };
        Some(IpiCommand { kind, destination: destination8(self.destination, self.logical) })
    }
}

fn command(icr: u64, addressed: impl Fn() -> Destination) -> Option<IpiCommand> {
    let vector = icr as u8;
    let kind = match icr >> 8 & 7 {
        0 => IpiKind::Fixed(vector),
        1 => IpiKind::LowestPriority(vector),
        4 => IpiKind::Nmi,
        // The level de-assert message of old APICs' arbitration, which nobody listens to any more.
        5 if icr & (TRIGGER_LEVEL | LEVEL_ASSERT) == TRIGGER_LEVEL => return None,
        5 => IpiKind::Init,
        6 => IpiKind::Startup(vector),
        // SMI has no handler here; 3 and 7 are reserved and not sent.
        _ => return None,
    };
    let destination = match icr >> 18 & 3 {
        1 => Destination::Myself,
        2 => Destination::All,
        3 => Destination::Others,
        _ => addressed(),
    };
    // A CPU can't reset or start itself by shorthand (APM vol. 2, table 16-4): such a command is not sent to the sender.
    let destination = match (kind, destination) {
        (IpiKind::Init | IpiKind::Startup(_), Destination::Myself) => return None,
        (IpiKind::Init | IpiKind::Startup(_), Destination::All) => Destination::Others,
        (_, destination) => destination,
    };
    Some(IpiCommand { kind, destination })
}

/// The logical ID that x2APIC mode derives from the APIC ID: cluster in 31:16, one bit of 15:0.
pub const fn logical_id(apic_id: u32) -> u32 {
    apic_id >> 4 << 16 | 1 << (apic_id & 15)
}

impl Destination {
    fn matches(self, sender: u32, id: u32, addressing: Addressing) -> bool {
        match self {
            Self::Myself => id == sender,
            Self::All => true,
            Self::Others => id != sender,
            Self::Physical(to) => to == BROADCAST || to == id,
            Self::Logical(to) => {
                let mine = logical_id(id);
                match addressing {
                    _ if to == BROADCAST => true,
                    Addressing::X2Apic => to >> 16 == mine >> 16 && to & mine & 0xffff != 0,
                    addressing => to <= 0xff && addressing.matches(to as u8, id),
                }
            }
            Self::Logical8(to) => addressing.matches(to, id),
        }
    }
}

/// Which vCPUs a command reaches, by their place in `all`. At most [`MAX_VCPUS`] are looked at. Lowest-priority delivery
/// goes to the first that matches: there is no arbitration, and any choice is legal.
pub fn route<'a>(command: &IpiCommand, sender: u32, all: impl Iterator<Item = &'a LapicShared>) -> VcpuSet {
    let mut set = VcpuSet::default();
    for (index, shared) in all.enumerate().take(MAX_VCPUS) {
        if command.destination.matches(sender, shared.id(), shared.addressing()) {
            set.insert(index);
            if matches!(command.kind, IpiKind::LowestPriority(_)) {
                break;
            }
        }
    }
    set
}

/// A set of vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuSet([u64; 4]);

impl VcpuSet {
    /// Adds vCPU `index` (below 256; others are ignored).
    pub fn insert(&mut self, index: usize) {
        if let Some(word) = self.0.get_mut(index / 64) {
            *word |= 1 << (index % 64);
        }
    }

    /// Whether vCPU `index` is in the set.
    pub fn contains(&self, index: usize) -> bool {
        self.0.get(index / 64).is_some_and(|word| word & 1 << (index % 64) != 0)
    }

    /// Whether nobody is in the set.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// The vCPUs in the set, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + use<> {
        let words = self.0;
        (0..256).filter(move |index| words[index / 64] & 1 << (index % 64) != 0)
    }
}
