//! The sets of numbers that signed codes stand for.

/// A set of signed numbers; a weight is a scale times one of them.
pub trait Grid {
    /// The most negative number, which is also the largest in magnitude.
    const LOW: f32;
    /// The largest number.
    const HIGH: f32;
    /// How vectors come to the nearest number, unless it has all integers between these and nothing else.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // for instructions of x86
    const BINS: Option<&Bins>;
    /// The number nearest to `t`.
    fn nearest(t: f32) -> f32;
}

/// Sixteen bins of equal width: the nearest number to any `t` is one of two. Bin `i`, which is -8 to 7, has place `i & 15`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // for instructions of x86
pub struct Bins {
    /// What `t` is limited to first: there is nothing between numbers beyond.
    pub least: f32,
    pub most: f32,
    /// The bin is the integer nearest to `t * scale + offset`.
    pub scale: f32,
    pub offset: f32,
    /// From here on the larger number is the nearest,
    pub middle: [f32; 16],
    /// below it the smaller.
    pub smaller: [f32; 16],
    pub larger: [f32; 16],
}

/// The integers `-HALF ..= HALF - 1`.
pub struct Integers<const HALF: i32>;

impl<const HALF: i32> Grid for Integers<HALF> {
    const LOW: f32 = -HALF as f32;
    const HIGH: f32 = (HALF - 1) as f32;
    const BINS: Option<&Bins> = None;

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
const fn iq4_bin(t: f32) -> usize {
    // 2^23 + n has n in its low bits. An exact multiple of 1/2 may land in either neighbour bin: a tie.
    let n = (super::limit(t, Iq4::LOW, Iq4::HIGH) + 128.0) * 2.0 - 0.5;
    ((n + 8_388_608.0).to_bits() & 511) as usize
}

/// The bins are 14 wide and begin at -10.75 + 14 i, which leaves at most one midpoint in each, and none within 1/4 of an end.
static IQ4_BINS: Bins = {
    const WIDTH: f32 = 14.0;
    const START: f32 = -10.75;
    let mut bins = Bins {
        least: -120.0,
        most: 101.125,
        scale: 1.0 / WIDTH,
        offset: -START / WIDTH - 0.5,
        middle: [f32::NEG_INFINITY; 16],
        smaller: [0.0; 16],
        larger: [0.0; 16],
    };
    let mut i = -8i32;
    while i < 8 {
        let place = (i & 15) as usize;
        let begin = START + WIDTH * i as f32;
        let (smaller, larger) = (iq4_bin(begin), iq4_bin(begin + WIDTH));
        bins.smaller[place] = IQ4_NEAREST_VALUE[smaller];
        bins.larger[place] = IQ4_NEAREST_VALUE[larger];
        if IQ4_NEAREST[smaller] != IQ4_NEAREST[larger] {
            assert!(IQ4_NEAREST[smaller] + 1 == IQ4_NEAREST[larger]);
            let mut middle = (bins.smaller[place] + bins.larger[place]) / 2.0;
            // The table takes numbers near the midpoint as if they were on it: t + 128 is rounded.
            while IQ4_NEAREST[iq4_bin(middle)] == IQ4_NEAREST[larger] {
                middle = middle.next_down();
            }
            while IQ4_NEAREST[iq4_bin(middle)] == IQ4_NEAREST[smaller] {
                middle = middle.next_up();
            }
            bins.middle[place] = middle;
        }
        i += 1;
    }
    bins
};

impl Grid for Iq4 {
    const LOW: f32 = -127.0;
    const HIGH: f32 = 113.0;
    const BINS: Option<&Bins> = Some(&IQ4_BINS);

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
