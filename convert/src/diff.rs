//! Two GGUF files of any kind side by side. Both are read where they are mapped.

use kestrel_formats::gguf::{Gguf, TensorInfo};
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_quant::error_measure::ErrorStats;
use kestrel_quant::transform;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Weights that are compared at a time: whole blocks of every type.
const PIECE: usize = 1 << 16;
/// Threads beyond this have nothing to do.
const THREADS_MAX: usize = 256;

/// A tensor of either file.
#[derive(Clone, Debug)]
pub struct TensorDiff {
    /// Its name.
    pub name: String,
    /// What it is in the first file.
    pub a: Option<TensorInfo>,
    /// What it is in the second.
    pub b: Option<TensorInfo>,
    /// How far the second's numbers are from the first's; `None` if the shapes differ or one is absent.
    pub stats: Option<ErrorStats>,
}

impl TensorDiff {
    /// Whether type, shape or a number differs.
    pub fn differs(&self) -> bool {
        match (&self.a, &self.b, &self.stats) {
            (Some(a), Some(b), Some(s)) => {
                a.dtype != b.dtype || s.relative_rmse() > 0.0 || s.n_nan + s.n_inf > 0
            }
            _ => true,
        }
    }
}

/// Compares all tensors, in the order of `a`, then those that only `b` has. `progress` is called once per tensor of `a`.
///
/// Errors: `Interrupted`.
pub fn diff(
    a: &Gguf,
    b: &Gguf,
    threads: usize,
    cancel: &AtomicBool,
    progress: &(dyn Fn() + Sync),
) -> Result<Vec<TensorDiff>> {
    let of_a = a.tensors();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        let mut scratch = Scratch::default();
        while let Some(info) = of_a.get(next.fetch_add(1, Ordering::Relaxed)) {
            let other = b.tensor(&info.name).map(|t| t.info.clone());
            let same_shape = other.as_ref().filter(|o| o.shape == info.shape);
            let stats = same_shape.and_then(|o| scratch.compare((a, info), (b, o), cancel));
            done.push((
                info.name.as_str(),
                TensorDiff { name: info.name.clone(), a: Some(info.clone()), b: other, stats },
            ));
            progress();
            if cancel.load(Ordering::Relaxed) {
                break;
            }
        }
        done
    };
    // The caller works too, so that a system without threads to give still does it.
    let mut done = std::thread::scope(|scope| {
        let spawn =
            |_| std::thread::Builder::new().name("kestrel-diff".into()).spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads.min(THREADS_MAX)).filter_map(spawn).collect();
        let mut done = work();
        done.extend(others.into_iter().flat_map(|t| t.join().unwrap_or_default()));
        done
    });
    if cancel.load(Ordering::Relaxed) {
        return Err(Error::new(ErrorKind::Interrupted));
    }
    let place: std::collections::HashMap<&str, usize> =
        of_a.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
    done.sort_by_key(|(name, _)| place.get(name));
    let mut out: Vec<TensorDiff> = done.into_iter().map(|(_, diff)| diff).collect();
    let only_b = b.tensors().iter().filter(|t| a.tensor(&t.name).is_none());
    out.extend(only_b.map(|t| TensorDiff { name: t.name.clone(), a: None, b: Some(t.clone()), stats: None }));
    Ok(out)
}

#[derive(Default)]
struct Scratch {
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Scratch {
    /// The error over a whole tensor, summed in order.
    fn compare(
        &mut self,
        a: (&Gguf, &TensorInfo),
        b: (&Gguf, &TensorInfo),
        cancel: &AtomicBool,
    ) -> Option<ErrorStats> {
        let n_weights = a.1.shape.iter().product::<u64>() as usize;
        let mut stats = ErrorStats::default();
        for first in (0..n_weights).step_by(PIECE) {
            if cancel.load(Ordering::Relaxed) {
                return None;
            }
            let n = PIECE.min(n_weights - first);
            floats(a, first, n, &mut self.a);
            floats(b, first, n, &mut self.b);
            stats.accumulate(&self.a, &self.b);
        }
        Some(stats)
    }
}

/// Weights `first..first + n` of a tensor.
fn floats((file, info): (&Gguf, &TensorInfo), first: usize, n: usize, out: &mut Vec<f32>) {
    let (map, range) = file.map_of(info);
    let (len, bytes) = (info.dtype.block_len(), info.dtype.block_bytes());
    let at = range.start + first / len * bytes;
    out.resize(n, 0.0);
    transform::to_f32(info.dtype, &map[at..at + n / len * bytes], out);
}
