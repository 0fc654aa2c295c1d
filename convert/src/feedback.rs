//! Error feedback of tensors whose pieces are being quantized: prepared with the first piece, dropped with the last.

use crate::plan::{Options, Plan};
use crate::stream::Piece;
use kestrel_formats::calibration::Calibration;
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_quant::feedback::Feedback;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// For every tensor of a plan.
pub(crate) struct Feedbacks<'a> {
    plan: &'a Plan,
    calibration: Option<&'a Calibration>,
    sweeps: usize,
    slots: Vec<Slot>,
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
        Self { plan, calibration: options.calibration.as_ref(), sweeps: options.sweeps, slots }
    }

    /// Of this tensor, if the plan says that it has some. Errors: `Inconsistent` if its products are not those of
    /// inputs.
    pub(crate) fn of(&self, tensor: usize) -> Result<Option<Arc<Feedback>>> {
        let planned = &self.plan.tensors[tensor];
        let Some(calibration) = self.calibration.filter(|_| planned.fed) else { return Ok(None) };
        let mut slot = self.slots[tensor].feedback.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            let products = calibration.products(&planned.name);
            let feedback = products.and_then(|(products, group)| Feedback::new(products, group));
            let feedback = feedback.map(|f| f.with_sweeps(self.sweeps));
            *slot = Some(Arc::new(feedback.ok_or_else(|| {
                Error::new(ErrorKind::Inconsistent)
                    .file(calibration.path())
                    .what(format!("products of \"{}\"", planned.name))
                    .expected("those of the inputs of a matrix")
                    .found("others: not finite, or not positive definite")
            })?));
        }
        Ok(slot.clone())
    }

    /// A piece is quantized.
    pub(crate) fn done(&self, piece: &Piece) {
        let slot = &self.slots[piece.tensor];
        if slot.rows_left.fetch_sub(piece.rows, Ordering::Relaxed) == piece.rows {
            *slot.feedback.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}
