//! Segment registers, between the control block and whoever else has a form of its own for them.

use nestling_control::message;

use super::super::vmcb::Segment;
use super::Vcpu;
use super::paging::Paging;
use crate::emulate::{SegmentRegister, segment};
use crate::guest::entry as start;

impl<P: Paging> Vcpu<P> {
    /// What an instruction did that was executed in software.
    pub(super) fn load_segment(&mut self, which: SegmentRegister, loaded: &start::Segment) {
        let vmcb = self.vmcb_mut();
        let save = &mut vmcb.save;
        let register = match which {
            SegmentRegister::Code(segment::ES) => &mut save.es,
            SegmentRegister::Code(segment::CS) => &mut save.cs,
            SegmentRegister::Code(segment::SS) => {
                // The stack pointer comes next.
                vmcb.control.shadow = 1;
                &mut save.ss
            }
            SegmentRegister::Code(segment::DS) => &mut save.ds,
            SegmentRegister::Code(segment::FS) => &mut save.fs,
            SegmentRegister::Code(_) => &mut save.gs,
            SegmentRegister::Ldtr => &mut save.ldtr,
            SegmentRegister::Tr => &mut save.tr,
        };
        *register = segment_in(loaded);
    }
}

pub(super) fn segment_back(from: message::Segment) -> Segment {
    Segment { selector: from.selector, attributes: from.attributes, limit: from.limit, base: from.base }
}

pub(super) fn segment_in(from: &start::Segment) -> Segment {
    Segment { selector: from.selector, attributes: from.attributes, limit: from.limit, base: from.base }
}

pub(super) fn segment_out(from: &Segment) -> message::Segment {
    message::Segment { selector: from.selector, attributes: from.attributes, limit: from.limit, base: from.base }
}
