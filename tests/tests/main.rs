//! One integration crate; each module is an area.
#![allow(missing_docs)]

mod forward;
mod reference;
