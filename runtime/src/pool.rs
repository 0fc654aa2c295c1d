//! Fork and join over a fixed set of threads: the caller is worker 0, the others spin for a short while between jobs
//! and then sleep. A fork costs one store and a join one counter; no allocation, and no lock that anyone else holds.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};

/// Rounds of waiting before a worker sleeps: some 100 µs, longer than the gaps between the phases of a layer.
const SPINS: u32 = 4096;

/// A fixed set of threads that run one job at a time together.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    wakers: Vec<Thread>,
}

/// The job of an epoch; valid from the store of `epoch` until `running` is zero again.
type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Counts the jobs; a worker runs when it differs from what it has seen.
    epoch: AtomicUsize,
    /// Workers that have not finished the current job.
    running: AtomicUsize,
    /// Per worker: it is asleep, or about to be.
    asleep: Vec<AtomicBool>,
    stop: AtomicBool,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the owner of the pool while `running` is zero, and read by workers only between
// their acquire of the epoch that announces it and their release of `running`; see `Pool::run`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is to a `Sync` closure.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `n_threads` (at least one) workers, the caller of [`Self::run`] included. If the system refuses a
    /// thread the pool has fewer workers.
    pub fn new(n_threads: usize) -> Self {
        let n_others = n_threads.max(1) - 1;
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            asleep: (0..n_others).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
        });
        let spawn = |i: usize| {
            let shared = shared.clone();
            let builder = std::thread::Builder::new().name(format!("kestrel-{}", i + 1));
            builder.spawn(move || shared.work(i)).ok()
        };
        let threads: Vec<_> = (0..n_others).map_while(spawn).collect();
        let wakers = threads.iter().map(|t| t.thread().clone()).collect();
        Self { shared, threads, wakers }
    }

    /// Workers, the caller included.
    pub fn n_workers(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `job(worker)` for every worker 0..n at the same time and returns when all are done. A panic in any of
    /// them is raised again here, after all are done.
    pub fn run(&mut self, job: impl Fn(usize) + Sync) {
        if self.threads.is_empty() {
            return job(0);
        }
        let shared = &*self.shared;
        let short: *const (dyn Fn(usize) + Sync + '_) = &job;
        // SAFETY: only the lifetime is changed. `&mut self` excludes a second run, `running` is zero, so no worker
        // reads the cell now; workers use the pointer only before they decrement `running`, and `job` outlives that
        // because this function waits for zero before it returns or unwinds.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(short))
        };
        shared.running.store(self.threads.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (asleep, thread) in shared.asleep.iter().zip(&self.wakers) {
            if asleep.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        let mut spins = 0;
        while shared.running.load(Ordering::Acquire) != 0 {
            wait(&mut spins);
        }
        // Taken even if the caller's own part panicked: it belongs to this job and to no later one. No worker holds
        // the lock any more, so this never waits.
        let theirs = shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for thread in &self.wakers {
            thread.unpark();
        }
        for thread in self.threads.drain(..) {
            // Jobs are caught, so a worker never ends by a panic.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The life of worker `i + 1`.
    fn work(&self, i: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_epoch(i, seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: the epoch was acquired, so the job of this epoch is written, and it stays until this worker
            // decrements `running` below; `Pool::run` keeps the closure alive until then.
            let job = unsafe { (*self.job.get()).map(|job| &*job) };
            if let Some(job) = job
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(i + 1)))
            {
                self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic);
            }
            self.running.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for an epoch other than `seen`.
    fn next_epoch(&self, i: usize, seen: usize) -> usize {
        for _ in 0..SPINS {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            std::hint::spin_loop();
        }
        loop {
            // The caller raises the epoch before it looks at this flag, and the flag is raised before the epoch is
            // looked at here (both sequentially consistent): one of the two sees the other, so no wake-up is lost.
            // A swap, not a store: qemu 7.2 on x86 lets aarch64's store-release pass the load-acquire that follows it
            // (no mfence between them), and then a worker slept through a job after some 10⁵ to 10⁷ of them.
            self.asleep[i].swap(true, Ordering::SeqCst);
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch != seen {
                self.asleep[i].store(false, Ordering::SeqCst);
                return epoch;
            }
            std::thread::park();
        }
    }
}

/// Spins for a while, then gives the processor away at each call: when there are more threads than cores, the one
/// that is waited for must get one.
fn wait(spins: &mut u32) {
    if *spins < SPINS {
        *spins += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_worker_runs_every_job_once() {
        for n in [1, 2, 3, 8] {
            let mut pool = Pool::new(n);
            assert_eq!(pool.n_workers(), n);
            let counts: Vec<_> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..1000 {
                pool.run(|w| {
                    counts[w].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == round + 1));
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let mut pool = Pool::new(3);
        let count = AtomicUsize::new(0);
        for round in 1..=5 {
            std::thread::sleep(Duration::from_millis(20));
            pool.run(|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 3 * round);
        }
    }

    #[test]
    fn a_panic_of_any_worker_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3);
        for bad in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(|w| assert!(w != bad, "worker {w}"))));
            let message = caught.unwrap_err().downcast_ref::<String>().cloned().unwrap_or_default();
            assert_eq!(message, format!("worker {bad}"));
            pool.run(|_| {});
        }
        let all = catch_unwind(AssertUnwindSafe(|| pool.run(|_| panic!("all"))));
        assert!(all.is_err());
        pool.run(|_| {});
    }
}
