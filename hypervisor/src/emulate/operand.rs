//! Memory operands: from segment and offset to a linear address, and from there to bytes.
//!
//! Segments are checked by what their hidden parts hold (AMD APM vol. 2, 4.12), which is what the CPU does too. An operand
//! that crosses a page is translated in full before its first byte moves.

use nestling::guest::{
    Controls, CpuFeatures, Marked, Mode, PageFault, Privilege, Refused, Request, Tables, Width, walk,
};
use nestling::{Access, Gpa};

use super::kept::Asked;
use super::{Bus, CodeSize, Cpu, Exception, HostFailure, Stop, segment};

const CR0_AM: u64 = 1 << 18;
const CR4_LA57: u64 = 1 << 12;
const RFLAGS_AC: u64 = 1 << 18;

const TYPE_CODE: u16 = 1 << 3;
/// Of data: the limit is a lower bound. Of code: conforming.
const TYPE_EXPAND_DOWN: u16 = 1 << 2;
/// Of data: writable. Of code: readable.
const TYPE_ACCESS: u16 = 1 << 1;
const SEGMENT_PRESENT: u16 = 1 << 7;
const SEGMENT_BIG: u16 = 1 << 10;

const PAGE: u64 = 4096;
/// How often an atomic update is tried while others are quicker.
const ATTEMPTS: usize = 64;

/// Where an operand is: one or two runs of guest-physical bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    first: u64,
    /// Bytes in the first page.
    split: usize,
    second: u64,
    bytes: usize,
}

/// A vCPU's view of memory.
pub(super) struct Space<'a, B> {
    pub(super) cpu: &'a Cpu,
    pub(super) bus: &'a mut B,
    /// Bytes of a table's entry.
    entry_bytes: usize,
}

/// A bus as the place of page tables.
struct TablesOn<'a, B> {
    bus: &'a mut B,
    failure: Option<HostFailure>,
}

const fn bytes_of(width: Width) -> usize {
    match width {
        Width::Four => 4,
        Width::Eight => 8,
    }
}

impl<B: Bus> Tables for TablesOn<'_, B> {
    fn read(&mut self, at: Gpa, width: Width) -> Option<u64> {
        self.bus.read_entry(at.0, bytes_of(width))
    }

    fn mark(&mut self, at: Gpa, width: Width, old: u64, new: u64) -> Marked {
        match self.bus.mark_entry(at.0, bytes_of(width), old, new) {
            Ok(true) => Marked::Done,
            Ok(false) => Marked::Changed,
            Err(failure) => {
                // The walk ends without its mark, and the failure is what counts.
                self.failure = Some(failure);
                Marked::ReadOnly
            }
        }
    }
}

impl<'a, B: Bus> Space<'a, B> {
    pub(super) fn new(cpu: &'a Cpu, bus: &'a mut B) -> Self {
        let entry_bytes = bytes_of(Self::mode(cpu, bus).entry_width());
        Self { cpu, bus, entry_bytes }
    }

    #[inline]
    fn mode<'m>(cpu: &Cpu, bus: &'m mut B) -> &'m Mode {
        let Cpu { cr0, cr4, efer, physical_bits, .. } = *cpu;
        // A CPU without 1 GiB pages stops a guest at such an entry before there is anything to execute in its stead.
        let features = CpuFeatures { physical_bits: physical_bits.min(52) as u8, gigantic_pages: true };
        bus.kept().mode(Controls { cr0, cr4, efer }, features)
    }

    /// Translates for an access that lies in one page.
    pub(super) fn translate(&mut self, linear: u64, access: Access) -> Result<u64, Stop> {
        let Cpu { cr3, cpl, pkru, .. } = *self.cpu;
        let privilege = match cpl {
            3 => Privilege::User,
            _ => Privilege::Supervisor { ac: self.cpu.registers.rflags & RFLAGS_AC != 0 },
        };
        let request = Request { linear, access, privilege, pkru };
        let asked = Asked::new(cr3, &request);
        match self.bus.page_again(&asked, self.entry_bytes) {
            Some(page) => Ok(page | linear % PAGE),
            None => self.walk(asked, &request),
        }
    }

    #[inline(never)]
    fn walk(&mut self, asked: Asked, request: &Request) -> Result<u64, Stop> {
        let mode = *Self::mode(self.cpu, self.bus);
        let mut tables = TablesOn { bus: self.bus, failure: None };
        let found = walk(&mode, asked.cr3(), request, &mut tables);
        if let Some(failure) = tables.failure {
            return Err(Stop::Host(failure));
        }
        match found {
            Ok(translation) => {
                // A mark that did not stick ends above: all are there.
                self.bus.kept().keep_walk(asked, &translation);
                Ok(translation.gpa.0)
            }
            Err(Refused::Fault(PageFault { code, address })) => {
                Err(Exception::PageFault { code: code.bits(), address }.into())
            }
            Err(Refused::NoMemory { .. }) => Err(Stop::Unsupported),
            Err(Refused::Changing) => Err(Stop::Again),
        }
    }

    /// Where `bytes` (1 to 8) bytes at an offset of a segment are, after all checks.
    pub(super) fn place(&mut self, segment: usize, offset: u64, bytes: usize, access: Access) -> Result<Place, Stop> {
        let linear = self.linear(segment, offset, bytes, access)?;
        let aligned = linear.is_multiple_of(bytes as u64);
        let checked = self.cpu.cr0 & CR0_AM != 0 && self.cpu.registers.rflags & RFLAGS_AC != 0 && self.cpu.cpl == 3;
        if checked && !aligned {
            return Err(Exception::AlignmentCheck.into());
        }
        let split = bytes.min((PAGE - linear % PAGE) as usize);
        let first = self.translate(linear, access)?;
        let second = if split < bytes {
            let next = linear.wrapping_add(split as u64);
            let wide = self.cpu.code_size() == CodeSize::Bits64;
            self.translate(if wide { next } else { next & 0xffff_ffff }, access)?
        } else {
            0
        };
        Ok(Place { first, split, second, bytes })
    }

    /// A segment's base; in 64-bit mode only FS and GS have one.
    pub(super) fn base(&self, which: usize) -> u64 {
        let wide = self.cpu.code_size() == CodeSize::Bits64;
        if wide && which < segment::FS { 0 } else { self.cpu.segments[which].base }
    }

    /// Whether the upper bits of an address repeat its topmost one.
    pub(super) fn is_canonical(&self, address: u64) -> bool {
        let unused = 64 - if self.cpu.cr4 & CR4_LA57 != 0 { 57 } else { 48 };
        ((address << unused) as i64 >> unused) as u64 == address
    }

    fn linear(&self, which: usize, offset: u64, bytes: usize, access: Access) -> Result<u64, Exception> {
        let violation = if which == segment::SS { Exception::Stack } else { Exception::GeneralProtection };
        let register = &self.cpu.segments[which];
        let last = offset.wrapping_add(bytes as u64 - 1);
        if self.cpu.code_size() == CodeSize::Bits64 {
            let base = self.base(which);
            let (first, last) = (base.wrapping_add(offset), base.wrapping_add(last));
            // In one page they are the same in what counts.
            let canonical = self.is_canonical(first) && (first / PAGE == last / PAGE || self.is_canonical(last));
            return if canonical { Ok(first) } else { Err(violation) };
        }
        let attributes = register.attributes;
        let code = attributes & TYPE_CODE != 0;
        if self.cpu.protected() {
            let allowed = match access {
                Access::Read => !code || attributes & TYPE_ACCESS != 0,
                _ => !code && attributes & TYPE_ACCESS != 0,
            };
            if attributes & SEGMENT_PRESENT == 0 || !allowed {
                return Err(violation);
            }
        }
        let limit = u64::from(register.limit);
        let inside = if !code && attributes & TYPE_EXPAND_DOWN != 0 && self.cpu.protected() {
            let top = if attributes & SEGMENT_BIG != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if inside && last >= offset { Ok(register.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(violation) }
    }

    /// Reads an operand.
    pub(super) fn load(&mut self, place: Place) -> Result<u64, Stop> {
        if place.split == place.bytes {
            return Ok(self.bus.read(place.first, place.bytes)?);
        }
        let mut value = 0;
        for (gpa, at, bytes) in place.pieces() {
            value |= self.bus.read(gpa, bytes)? << (8 * at);
        }
        Ok(value)
    }

    /// Writes an operand.
    pub(super) fn store(&mut self, place: Place, value: u64) -> Result<(), Stop> {
        if place.split == place.bytes {
            return Ok(self.bus.write(place.first, place.bytes, value & mask(place.bytes))?);
        }
        for (gpa, at, bytes) in place.pieces() {
            self.bus.write(gpa, bytes, value >> (8 * at) & mask(bytes))?;
        }
        Ok(())
    }

    /// Replaces an operand by what `change` makes of it, in one step unless it crosses a page. Returns what was there.
    pub(super) fn update(&mut self, place: Place, change: impl Fn(u64) -> u64) -> Result<u64, Stop> {
        for _ in 0..ATTEMPTS {
            let old = self.load(place)?;
            let new = change(old) & mask(place.bytes);
            if place.split < place.bytes {
                self.store(place, new)?;
                return Ok(old);
            }
            if self.bus.compare_exchange(place.first, place.bytes, old, new)? {
                return Ok(old);
            }
        }
        Err(Stop::Again)
    }
}

impl Place {
    /// The runs cut into accesses of 1, 2 and 4 bytes: guest-physical address, offset in the operand, length.
    fn pieces(self) -> impl Iterator<Item = (u64, usize, usize)> {
        let mut at = 0;
        core::iter::from_fn(move || {
            let (gpa, left) = if at < self.split {
                (self.first + at as u64, self.split - at)
            } else {
                (self.second + (at - self.split) as u64, self.bytes - at)
            };
            let bytes = match left {
                0 => return None,
                1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
            let piece = (gpa, at, bytes);
            at += bytes;
            Some(piece)
        })
    }
}

/// The bits of an operand of so many bytes.
pub(super) const fn mask(bytes: usize) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (8 * bytes)) - 1 }
}
