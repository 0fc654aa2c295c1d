//! Error feedback of tensors whose pieces are being quantized: prepared with the first piece, dropped with the last.

use crate::plan::{Options, Plan};
use crate::stream::{Piece, lock};
use kestrel_formats::calibration::Calibration;
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_quant::feedback::Feedback;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// For every tensor of a plan.
pub(crate) struct Feedbacks<'a> {
    plan: &'a Plan,
    calibration: Option<&'a Calibration>,
    sweeps: usize,
    slots: Vec<Slot>,
    /// Those of tensors that are done. Their memory is used again: given back by the thread that happens to be the last, it
    /// would stay with that thread, tens of MiB for each of many.
    spare: Mutex<Vec<Feedback>>,
}

struct Slot {
    feedback: Mutex<Option<Arc<Feedback>>>,
    rows_left: AtomicU64,
}

impl<'a> Feedbacks<'a> {
    /// None prepared.
    pub(crate) fn new(plan: &'a Plan, options: &'a Options) -> Self {
        let rows = |shape: &[u64]| shape.iter().rev().skip(1).product::<u64>();
        let slot = |rows_left: u64| Slot { feedback: Mutex::new(None), rows_left: AtomicU64::new(rows_left) };
        let slots = plan.tensors.iter().map(|t| slot(rows(&t.shape))).collect();
        Self {
            plan,
            calibration: options.calibration.as_ref(),
            sweeps: options.sweeps,
            slots,
            spare: Mutex::default(),
        }
    }

    /// Of this tensor, if the plan says that it has some. Errors: `Missing`, or `Inconsistent` if its products are not those
    /// of inputs.
    pub(crate) fn of(&self, tensor: usize) -> Result<Option<Arc<Feedback>>> {
        let planned = &self.plan.tensors[tensor];
        let Some(calibration) = self.calibration.filter(|_| planned.fed) else { return Ok(None) };
        let mut slot = lock(&self.slots[tensor].feedback);
        if slot.is_none() {
            let context =
                |e: Error| e.file(calibration.path()).what(format!("products of \"{}\"", planned.name));
            let missing = || context(Error::new(ErrorKind::Missing));
            let products = calibration.products(&planned.name).ok_or_else(missing)?;
            let mut feedback = self.spare(products.means.len()).with_sweeps(self.sweeps);
            feedback.renew(&products).map_err(context)?;
            *slot = Some(Arc::new(feedback));
        }
        Ok(slot.clone())
    }

    /// One that has room for these, and for not much more; or a new one.
    fn spare(&self, n_products: usize) -> Feedback {
        let mut spare = lock(&self.spare);
        let fits = |f: &Feedback| (n_products..=2 * n_products).contains(&f.capacity());
        let found = spare.iter().position(fits);
        found.map(|i| spare.swap_remove(i)).unwrap_or_default()
    }

    /// A piece is quantized.
    pub(crate) fn done(&self, piece: &Piece) {
        let slot = &self.slots[piece.tensor];
        if slot.rows_left.fetch_sub(piece.rows, Ordering::AcqRel) == piece.rows {
            // Nobody else has it: whoever did has said that their piece is done.
            let last = lock(&slot.feedback).take().and_then(Arc::into_inner);
            lock(&self.spare).extend(last);
        }
    }
}
