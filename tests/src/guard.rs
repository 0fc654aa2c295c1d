//! Memory that ends where a page begins that nobody may touch: one byte read beyond it ends the process.

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Deref;

/// Larger than the pages of any machine that runs the tests.
const PAGE_BYTES: usize = 64 << 10;

/// A copy of some numbers with an untouchable page directly behind it and another before its first page.
pub struct Guarded<T> {
    map: *mut c_void,
    map_bytes: usize,
    data: *const T,
    len: usize,
    _numbers: PhantomData<T>,
}

impl<T: Copy> Guarded<T> {
    /// Copies `numbers`, whose size is then a multiple of their alignment, to the end of a page.
    pub fn new(numbers: &[T]) -> Self {
        let n_bytes = std::mem::size_of_val(numbers);
        let inner = n_bytes.next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
        let map_bytes = inner + 2 * PAGE_BYTES;
        // SAFETY: a new private map that nothing else knows. The two outer pages are made untouchable, the inner ones
        // hold `n_bytes` before their end, which is aligned for `T` because `n_bytes` is a multiple of its size.
        unsafe {
            let map = mmap_anonymous(
                std::ptr::null_mut(),
                map_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
            .expect("memory");
            for guard in [map, map.add(PAGE_BYTES + inner)] {
                mprotect(guard, PAGE_BYTES, MprotectFlags::empty()).expect("a page that nobody may touch");
            }
            let data = map.cast::<u8>().add(PAGE_BYTES + inner - n_bytes).cast::<T>();
            std::ptr::copy_nonoverlapping(numbers.as_ptr(), data, numbers.len());
            Self { map, map_bytes, data, len: numbers.len(), _numbers: PhantomData }
        }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` put `len` numbers there, and the map lives as long as this does.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the map is this value's own and no borrow of it is left.
        let _ = unsafe { munmap(self.map, self.map_bytes) };
    }
}
