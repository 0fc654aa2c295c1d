//! The sets of numbers that signed codes stand for.

/// A set of signed numbers; a weight is a scale times one of them.
pub trait Grid {
    /// The most negative number, which is also the largest in magnitude.
    const LOW: f32;
    /// The largest number.
    const HIGH: f32;
    /// Whether it has all integers between these and nothing else.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // for instructions of x86
    const ARE_INTEGERS: bool;
    /// The number nearest to `t`.
    fn nearest(t: f32) -> f32;
}

/// The integers `-HALF ..= HALF - 1`.
pub struct Integers<const HALF: i32>;

impl<const HALF: i32> Grid for Integers<HALF> {
    const LOW: f32 = -HALF as f32;
    const HIGH: f32 = (HALF - 1) as f32;
    const ARE_INTEGERS: bool = true;

    #[inline(always)]
    fn nearest(t: f32) -> f32 {
        super::limit(super::round(t), Self::LOW, Self::HIGH)
    }
}

/// The values of IQ4_NL and IQ4_XS (ggml's public table `kvalues_iq4nl`), denser around zero.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// [`IQ4_VALUES`] as a grid.
pub struct Iq4;

/// Index of the nearest value for `t` in `[k/2, (k+1)/2)`, with k counted from -256. All midpoints between values are
/// multiples of 1/2, so none lies inside a bin.
static IQ4_NEAREST: [u8; 512] = {
    let mut table = [0u8; 512];
    let mut k = 0;
    while k < 512 {
        // In quarters the middle of a bin is an odd number, and no midpoint between values is.
        let middle = 2 * (k as i32 - 256) + 1;
        let mut best = 0;
        let mut j = 1;
        while j < 16 {
            if (4 * IQ4_VALUES[j] as i32 - middle).abs() < (4 * IQ4_VALUES[best] as i32 - middle).abs() {
                best = j;
            }
            j += 1;
        }
        table[k] = best as u8;
        k += 1;
    }
    table
};

static IQ4_NEAREST_VALUE: [f32; 512] = {
    let mut table = [0f32; 512];
    let mut k = 0;
    while k < 512 {
        table[k] = IQ4_VALUES[IQ4_NEAREST[k] as usize] as f32;
        k += 1;
    }
    table
};

/// The bin of `t` in [`IQ4_NEAREST`].
#[inline(always)]
fn iq4_bin(t: f32) -> usize {
    // 2^23 + n has n in its low bits. An exact multiple of 1/2 may land in either neighbour bin: a tie.
    let n = (super::limit(t, Iq4::LOW, Iq4::HIGH) + 128.0) * 2.0 - 0.5;
    ((n + 8_388_608.0).to_bits() & 511) as usize
}

impl Grid for Iq4 {
    const LOW: f32 = -127.0;
    const HIGH: f32 = 113.0;
    const ARE_INTEGERS: bool = false;

    #[inline(always)]
    fn nearest(t: f32) -> f32 {
        IQ4_NEAREST_VALUE[iq4_bin(t)]
    }
}

/// The index in [`IQ4_VALUES`] of a number on the grid.
#[inline(always)]
pub fn iq4_index(value: f32) -> u8 {
    IQ4_NEAREST[iq4_bin(value)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_the_nearest() {
        for n in -4000..4000 {
            let t = n as f32 / 31.0;
            let distance = IQ4_VALUES.iter().map(|&v| (f32::from(v) - t).abs()).fold(f32::MAX, f32::min);
            assert_eq!((Iq4::nearest(t) - t).abs(), distance, "{t}");
        }
        for (i, &v) in IQ4_VALUES.iter().enumerate() {
            assert_eq!(iq4_index(f32::from(v)), i as u8);
        }
    }

    #[test]
    fn nothing_panics_on_odd_floats() {
        for t in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38, 1e-40] {
            assert!((Iq4::LOW..=Iq4::HIGH).contains(&Iq4::nearest(t)));
            assert!((-32.0..=31.0).contains(&Integers::<32>::nearest(t)));
        }
    }
}
