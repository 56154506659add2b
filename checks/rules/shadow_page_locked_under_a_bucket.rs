//! Locks of shadow paging are taken in one order: a page's, its child's, one bucket's. Who holds a bucket's lock can take
//! no other.

use crate::shadow::order::Order;
use crate::shadow::page::Handle;
use crate::shadow::table::Inside;
use crate::{Gfn, Host};

pub(crate) fn right<H: Host>(inside: Inside<'_, H>, order: &mut Order<'_>, page: Handle) {
    let Some(mut page) = order.alive(inside, page) else { return };
    drop(page.bucket(inside, Gfn(0)));
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(inside: Inside<'_, H>, order: &mut Order<'_>, page: Handle) {
    let bucket = order.bucket(inside, Gfn(0));
    drop(order.alive(inside, page));
    drop(bucket);
}
