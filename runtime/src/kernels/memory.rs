//! Memory: aligned storage, views of it that several workers share, and fetching what is read next.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, compiler_fence};

/// Fetches the line at `p`, which need not exist, into the second-level cache.
#[inline(always)]
pub(crate) fn fetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64; a prefetch accesses nothing that a program can see.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Fetches what a loop with little to do will read some time after the line at `p`. Such a loop has several lines at work and
/// waits for none that is in the second-level cache, so that to fetch each into the first-level one as well, as
/// `few::fetch_line` does, would only take a load more.
#[inline(always)]
pub(crate) fn read_ahead(p: *const u8) {
    const BYTES: usize = 6144;
    // Else the compiler brings the loads of a step together, behind which these would wait.
    compiler_fence(Ordering::SeqCst);
    fetch(p.wrapping_add(BYTES));
}

/// Numbers for which all zero bits are a value.
pub(crate) trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for i32 {}
impl Plain for i8 {}
impl Plain for u8 {}

/// A zeroed slice that starts on a cache line. Pages take memory and time when they are first touched.
pub(crate) struct Aligned<T: Plain> {
    /// What was allocated: a little more, so that a cache line begins in it.
    allocation: NonNull<u8>,
    ptr: NonNull<T>,
    len: usize,
}

const LINE_BYTES: usize = 64;

// SAFETY: it owns plain numbers, as a Vec does.
unsafe impl<T: Plain + Send> Send for Aligned<T> {}
// SAFETY: as above.
unsafe impl<T: Plain + Sync> Sync for Aligned<T> {}

impl<T: Plain> Aligned<T> {
    pub fn zeroed(len: usize) -> Self {
        let Some(layout) = Self::layout(len) else {
            return Self { allocation: NonNull::dangling(), ptr: NonNull::dangling(), len: 0 };
        };
        // SAFETY: `layout` gives no layout of zero bytes.
        let allocation = unsafe { alloc_zeroed(layout) };
        let Some(allocation) = NonNull::new(allocation) else { handle_alloc_error(layout) };
        let to_line = allocation.as_ptr().align_offset(LINE_BYTES);
        assert!(to_line < LINE_BYTES);
        // SAFETY: the layout has so many bytes more than the numbers.
        let ptr = unsafe { allocation.add(to_line) }.cast();
        #[cfg(all(target_os = "linux", not(miri)))]
        advise_large_pages(allocation, layout.size());
        Self { allocation, ptr, len }
    }

    /// `None` for no bytes at all. Asks for no more than the numbers' own alignment: the system's allocator would write
    /// zeros over memory that it has to align further, although new pages are zero, and so touch all of it.
    fn layout(len: usize) -> Option<Layout> {
        let layout = Layout::array::<T>(len)
            .and_then(|numbers| Layout::from_size_align(numbers.size() + LINE_BYTES, numbers.align()))
            .expect("a buffer fits in memory");
        (len > 0).then_some(layout)
    }
}

/// Asks for large pages where there is room for any: each costs one fault instead of 512. Advice only.
#[cfg(all(target_os = "linux", not(miri)))]
fn advise_large_pages(allocation: NonNull<u8>, n_bytes: usize) {
    const LARGE_PAGE_BYTES: usize = 2 << 20;
    let before = allocation.as_ptr().align_offset(LARGE_PAGE_BYTES);
    let n_bytes = n_bytes.saturating_sub(before) / LARGE_PAGE_BYTES * LARGE_PAGE_BYTES;
    if n_bytes > 0 {
        // SAFETY: the range lies in the allocation, and the advice changes none of its bytes.
        let _ = unsafe {
            let start = allocation.as_ptr().add(before);
            rustix::mm::madvise(start.cast(), n_bytes, rustix::mm::Advice::LinuxHugepage)
        };
    }
}

impl<T: Plain> Clone for Aligned<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Plain> Drop for Aligned<T> {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated in `zeroed` with the same layout.
            unsafe { dealloc(self.allocation.as_ptr(), layout) };
        }
    }
}

impl<T: Plain> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised numbers were allocated in `zeroed`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

/// What each channel has `n` numbers of, (channels, n), as the kernels read it: `[channel / 16][n][16]`, with zeros for
/// channels that do not exist.
pub struct ByChannel {
    numbers: Aligned<f32>,
    n: usize,
}

impl ByChannel {
    /// From `rows` (channels, n).
    pub fn new(rows: &[f32], n: usize) -> Self {
        assert!(n > 0 && rows.len().is_multiple_of(n));
        let mut numbers = Aligned::zeroed((rows.len() / n).next_multiple_of(LANES) * n);
        for (rows, to) in rows.chunks(LANES * n).zip(numbers.chunks_exact_mut(LANES * n)) {
            for (c, row) in rows.chunks_exact(n).enumerate() {
                row.iter().zip(to.chunks_exact_mut(LANES)).for_each(|(&x, to)| to[c] = x);
            }
        }
        Self { numbers, n }
    }

    /// All of them.
    pub(crate) fn numbers(&self) -> &[f32] {
        &self.numbers
    }

    /// The numbers of `blocks` of 16 channels.
    pub(crate) fn part(&self, blocks: Range<usize>) -> &[f32] {
        let block_len = self.n * LANES;
        &self.numbers[blocks.start * block_len..blocks.end * block_len]
    }

    /// Whether there are `n` numbers of each of `n_channels`.
    pub(crate) fn is_of(&self, n_channels: usize, n: usize) -> bool {
        self.n == n && self.numbers.len() == n_channels.next_multiple_of(LANES) * n
    }
}

/// Numbers of every layer, in blocks of 16 channels: what a sequence remembers, which several workers advance together,
/// each its own channels.
#[derive(Clone)]
pub(crate) struct LayerBlocks {
    numbers: Aligned<f32>,
    n_blocks: usize,
    block_len: usize,
}

impl LayerBlocks {
    /// `n_layer` times `n_blocks` blocks of `block_len` zeros.
    pub fn zeroed(n_layer: usize, n_blocks: usize, block_len: usize) -> Self {
        let mut numbers = Aligned::zeroed(n_layer * n_blocks * block_len);
        // A new page that is read before it is written is first mapped to the page of zeros and then, with an interrupt to
        // every worker, to one of its own.
        numbers.fill(0.0);
        Self { numbers, n_blocks, block_len }
    }

    /// Some blocks of a layer.
    ///
    /// # Safety
    /// The numbers are borrowed exclusively by whoever shares them out, and no two parts that are alive at the same
    /// time overlap.
    #[allow(clippy::mut_from_ref)] // that is its purpose
    pub unsafe fn part(&self, layer: usize, blocks: Range<usize>) -> &mut [f32] {
        assert!(blocks.start <= blocks.end && blocks.end <= self.n_blocks, "{blocks:?} of {}", self.n_blocks);
        let start = (layer * self.n_blocks + blocks.start) * self.block_len;
        let len = blocks.len() * self.block_len;
        assert!(start + len <= self.numbers.len, "layer {layer}");
        // SAFETY: inside the buffer by the assertions, disjoint from the other parts by the caller's promise; the
        // pointer is the allocation's own, not one made from a shared reference.
        unsafe { std::slice::from_raw_parts_mut(self.numbers.ptr.as_ptr().add(start), len) }
    }
}

impl Deref for LayerBlocks {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.numbers
    }
}

impl DerefMut for LayerBlocks {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers
    }
}

/// A mutable slice of which each worker takes its own part.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out only by `part`, whose callers keep them disjoint.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), _borrow: PhantomData }
    }

    /// The part `range`.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    #[allow(clippy::mut_from_ref)] // that is its purpose
    pub unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: inside the borrowed slice by the assertion, disjoint from the other parts by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

/// Numbers that belong to a group of 16 rows or channels.
pub const LANES: usize = 16;

/// Where a matmul puts its results: row r of token t is at `r / 16 * row16_stride + t * token_stride + r % 16`.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a> {
    numbers: SharedMut<'a, f32>,
    row16_stride: usize,
    token_stride: usize,
    /// Added to every row.
    row0: usize,
    /// Add to what is there instead of replacing it.
    add: bool,
}

impl<'a> Out<'a> {
    /// Results as [token][row] with `width` numbers per token.
    pub fn token_major(numbers: &'a mut [f32], width: usize, add: bool) -> Self {
        Self { numbers: SharedMut::new(numbers), row16_stride: LANES, token_stride: width, row0: 0, add }
    }

    /// Results as [row / 16][token][16] for `n_tokens` tokens.
    pub fn blocked(numbers: &'a mut [f32], n_tokens: usize) -> Self {
        Self {
            numbers: SharedMut::new(numbers),
            row16_stride: n_tokens * LANES,
            token_stride: LANES,
            row0: 0,
            add: false,
        }
    }

    /// The same place with rows counted from `row`, a multiple of 16.
    pub fn starting_at(&self, row: usize) -> Self {
        debug_assert!(row.is_multiple_of(LANES));
        Self { row0: self.row0 + row, ..*self }
    }

    /// Everything of the rows `16 · blocks`, of a blocked output.
    ///
    /// # Safety
    /// As for [`SharedMut::part`].
    pub unsafe fn part(&self, blocks: Range<usize>) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.numbers.part(blocks.start * self.row16_stride..blocks.end * self.row16_stride) }
    }

    /// Stores `values` as rows `row..` (at most 16, `row` a multiple of 16) of token `t`.
    ///
    /// # Safety
    /// No other worker accesses these rows at the same time.
    #[inline(always)]
    pub unsafe fn put(&self, row: usize, t: usize, values: &[f32]) {
        debug_assert!(row.is_multiple_of(LANES) && values.len() <= LANES);
        let start = (self.row0 + row) / LANES * self.row16_stride + t * self.token_stride;
        // SAFETY: the caller's promise.
        let to = unsafe { self.numbers.part(start..start + values.len()) };
        if self.add {
            to.iter_mut().zip(values).for_each(|(to, v)| *to += v);
        } else if let (Ok(to), Ok(values)) =
            (<&mut [f32; LANES]>::try_from(&mut *to), <&[f32; LANES]>::try_from(values))
        {
            *to = *values; // no call for what nearly always is one vector
        } else {
            to.copy_from_slice(values);
        }
    }
}

/// Activations of the d_inner-wide part of a layer: `[channel / 16][token][16]`, so that a range of channels is one
/// slice and 16 channels of a token are one vector. Channels beyond the last are padding.
pub struct Channels {
    numbers: Aligned<f32>,
    n_blocks: usize,
    n_tokens: usize,
}

impl Channels {
    /// Room for `n_channels` of at most `n_tokens` tokens.
    pub fn with_capacity(n_channels: usize, n_tokens: usize) -> Self {
        let n_blocks = n_channels.div_ceil(LANES);
        Self { numbers: Aligned::zeroed(n_blocks * n_tokens * LANES), n_blocks, n_tokens: 0 }
    }

    /// Sets the number of tokens; what is stored becomes meaningless.
    pub(crate) fn set_tokens(&mut self, n_tokens: usize) {
        assert!(
            self.n_blocks * n_tokens * LANES <= self.numbers.len(),
            "more tokens than the buffer was made for"
        );
        self.n_tokens = n_tokens;
    }

    /// The number of channel `c` of token `t`.
    pub fn at(&self, c: usize, t: usize) -> f32 {
        self.numbers[(c / LANES * self.n_tokens + t) * LANES + c % LANES]
    }

    pub(crate) fn numbers(&self) -> &[f32] {
        &self.numbers[..self.n_blocks * self.n_tokens * LANES]
    }

    pub(crate) fn numbers_mut(&mut self) -> &mut [f32] {
        &mut self.numbers[..self.n_blocks * self.n_tokens * LANES]
    }
}
