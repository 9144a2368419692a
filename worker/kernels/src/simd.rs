//! Sixteen lanes of f32, on four instruction sets.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use half::{bf16, f16};

/// Numbers in a vector, on every instruction set.
pub const LANES: usize = 16;

/// What the process computes with. Chosen once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstructionSet {
    /// AVX-512 (F, BW, VL) with F16C, and its dot product of bf16 pairs.
    Avx512Bf16,
    /// AVX-512 (F, BW, VL) with F16C.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Whatever the compiler's target has.
    Portable,
}

impl InstructionSet {
    /// The best one of this machine, or the one that `TURRET_INSTRUCTION_SET` (avx512bf16, avx512, avx2, portable)
    /// names, if the machine has it.
    pub fn get() -> Self {
        static CHOSEN: OnceLock<InstructionSet> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let best = Self::detect();
            match (std::env::var("TURRET_INSTRUCTION_SET").as_deref(), best) {
                (Ok("portable"), _) => Self::Portable,
                (Ok("avx2"), Self::Avx512Bf16 | Self::Avx512) => Self::Avx2,
                (Ok("avx512"), Self::Avx512Bf16) => Self::Avx512,
                _ => best,
            }
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        match (avx2, avx512, is_x86_feature_detected!("avx512bf16")) {
            (true, true, true) => Self::Avx512Bf16,
            (true, true, false) => Self::Avx512,
            (true, false, _) => Self::Avx2,
            _ => Self::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        Self::Portable
    }
}

/// Sixteen lanes on one instruction set.
///
/// # Safety
/// Methods may only run where the instruction set was detected, that is, below [`launch`]; pointers must be valid
/// for sixteen elements.
#[allow(clippy::missing_safety_doc, reason = "one contract for all, above")]
pub(crate) trait Simd {
    type V: Copy;
    /// What is multiplied at once of sixteen pairs of bf16.
    type Pairs: Copy;
    /// Sixteen groups of four bytes.
    type Quads: Copy;
    /// One such group, in all lanes, ready to be multiplied.
    type Quad: Copy;
    /// Sixteen whole numbers of 32 bits.
    type Ints: Copy;
    /// Whether a tile of four by four vectors fits the registers; else it is two by two.
    const WIDE: bool;
    /// Most rows of a tile of sums that stays in registers, with the vectors beside it.
    const TILE_ROWS: usize;
    /// Most vectors of sums in such a tile.
    const TILE_VECTORS: usize;
    /// The same where sums are whole numbers and weights bytes.
    const BYTE_TILE_ROWS: usize;
    const BYTE_TILE_VECTORS: usize;
    /// Runs a loop as a function of its own.
    unsafe fn call<K: Kernel>(kernel: K);
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    unsafe fn store(to: *mut f32, x: Self::V);
    /// `a * b + c`, rounded once where the instruction set can, else twice.
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// In how many phases pairs are multiplied: both numbers at once, or the second ones and then the first ones, widened.
    const PAIR_PHASES: usize;
    /// What one phase multiplies, of sixteen pairs.
    unsafe fn load_pairs(from: *const bf16, phase: usize) -> Self::Pairs;
    /// What one phase multiplies, of one pair, in all lanes.
    unsafe fn splat_pair(from: *const u32) -> Self::Pairs;
    /// In every lane: the products of a phase, added to `c`.
    unsafe fn dot_pairs(a: Self::Pairs, b: Self::Pairs, c: Self::V) -> Self::V;
    /// Thirty-two numbers, each rounded to the nearest bf16, as sixteen pairs.
    #[inline(always)]
    unsafe fn round_pairs(from: *const f32, to: *mut u32) {
        // SAFETY: the caller's contract: thirty-two numbers, sixteen pairs.
        let (from, to) = unsafe { (&*from.cast::<[f32; 2 * LANES]>(), &mut *to.cast::<[u32; LANES]>()) };
        for i in 0..LANES {
            to[i] = round_pair(from[2 * i], from[2 * i + 1]);
        }
    }
    unsafe fn zero_ints() -> Self::Ints;
    unsafe fn ints_to_floats(x: Self::Ints) -> Self::V;
    /// Sixty-four signed bytes.
    unsafe fn load_quads(from: *const u8) -> Self::Quads;
    /// Four signed bytes, none of them -128.
    unsafe fn splat_quad(from: *const u32) -> Self::Quad;
    /// In every lane: the four products, added to `c`. Exact where no byte is -128.
    unsafe fn dot_quads(a: Self::Quads, b: Self::Quad, c: Self::Ints) -> Self::Ints;
    /// Asks for a cache line that will be read soon.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    /// Stores the lanes that are at least `from` and less than `below`, in order and without gaps, and gives how many they
    /// are. All sixteen numbers at `to` may be written.
    #[inline(always)]
    unsafe fn store_between(to: *mut f32, x: Self::V, from: f32, below: f32) -> usize {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has sixteen elements, and so has `to` by the caller's contract.
        let to = unsafe {
            Self::store(lanes.as_mut_ptr(), x);
            &mut *to.cast::<[f32; LANES]>()
        };
        let mut kept = 0;
        for lane in lanes {
            // Written always and kept sometimes: a branch would be mispredicted for every other number.
            to[kept & (LANES - 1)] = lane;
            kept += usize::from(lane >= from && lane < below);
        }
        kept
    }
    /// The sum of all lanes, in a fixed order.
    #[inline(always)]
    unsafe fn sum(x: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { Self::store(lanes.as_mut_ptr(), x) };
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}

/// Two numbers rounded to bf16, the first in the low half.
#[inline(always)]
pub(crate) fn round_pair(first: f32, second: f32) -> u32 {
    #[inline(always)]
    fn round(x: f32) -> u32 {
        let bits = x.to_bits();
        let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        if x.is_nan() { (bits >> 16) | 0x40 } else { nearest }
    }
    round(first) | (round(second) << 16)
}

/// A loop that can run on any instruction set.
pub(crate) trait Kernel {
    /// Runs it. Must be `#[inline(always)]`, with everything below it, so that it is compiled for the instruction set.
    ///
    /// # Safety
    /// Only [`launch`] may call this.
    unsafe fn run<S: Simd>(self);
}

/// Runs a loop on the process's instruction set.
pub(crate) fn launch<K: Kernel>(kernel: K) {
    match InstructionSet::get() {
        // SAFETY: the instruction set was detected on this machine.
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512Bf16 => unsafe { x86::run_avx512_bf16(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 => unsafe { x86::run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => unsafe { x86::run_avx2(kernel) },
        // SAFETY: needs nothing.
        _ => unsafe { kernel.run::<Portable>() },
    }
}

/// Words that a pair of inputs takes where they are laid out for tiles: [`Simd::PAIR_PHASES`] of the process's instruction set.
pub(crate) fn pair_words() -> usize {
    match InstructionSet::get() {
        InstructionSet::Avx512Bf16 => 1,
        InstructionSet::Avx512 | InstructionSet::Avx2 | InstructionSet::Portable => 2,
    }
}

/// An element of a weight or of the KV cache.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    const ZERO: Self;
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's contract.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's contract.
        unsafe { S::load_bf16(from) }
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

impl Element for f16 {
    const ZERO: Self = f16::ZERO;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's contract.
        unsafe { S::load_f16(from) }
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

/// The first `count < 16` elements at `from`, followed by zeros.
///
/// # Safety
/// As [`Simd`], with `from` valid for `count` elements.
#[inline(always)]
pub(crate) unsafe fn load_part<S: Simd, E: Element>(from: *const E, count: usize) -> S::V {
    let mut lanes = [E::ZERO; LANES];
    // SAFETY: `count` elements are readable, and the array is longer.
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
        E::load::<S>(lanes.as_ptr())
    }
}

/// `e^x` in every lane, to about one unit in the last place; 0 below −87.3, and not-a-number stays so.
#[inline(always)]
pub(crate) fn exp(x: &mut [f32; LANES]) {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, so that x - n ln 2 loses nothing.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding this rounds to a whole number, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    for x in x {
        let v = *x;
        let clamped = if v > 88.0 { 88.0 } else { v };
        let rounded = clamped * LOG2_E + ROUND;
        let n = rounded - ROUND;
        let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
        let mut p = 1.987_569_1e-4_f32;
        p = p * r + 1.398_199_9e-3;
        p = p * r + 8.333_452e-3;
        p = p * r + 4.166_579_6e-2;
        p = p * r + 1.666_666_5e-1;
        p = p * r + 0.5;
        p = p * r * r + r + 1.0;
        let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000));
        *x = if v < -87.3 { 0.0 } else { p * power };
    }
}

/// Runs a block for each constant below a count of at most four. A loop would be unrolled by the compiler too, but after
/// it has decided what lives in registers.
macro_rules! unroll {
    ($i:ident < $count:ident $body:block) => {{
        if 0 < $count {
            const $i: usize = 0;
            $body
        }
        if 1 < $count {
            const $i: usize = 1;
            $body
        }
        if 2 < $count {
            const $i: usize = 2;
            $body
        }
        if 3 < $count {
            const $i: usize = 3;
            $body
        }
    }};
}
pub(crate) use unroll;

/// Plain arrays: the compiler uses what its target has.
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; LANES];
    type Pairs = Self::V;
    type Quads = [[i8; 4]; LANES];
    type Quad = [i8; 4];
    type Ints = [i32; LANES];
    const PAIR_PHASES: usize = 2;
    const WIDE: bool = false;
    const TILE_ROWS: usize = 2;
    const TILE_VECTORS: usize = 2;
    const BYTE_TILE_ROWS: usize = 2;
    const BYTE_TILE_VECTORS: usize = 2;
    unsafe fn call<K: Kernel>(kernel: K) {
        // SAFETY: the caller's contract.
        unsafe { kernel.run::<Self>() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller's contract; an array of f32 may be read unaligned.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        // SAFETY: as above.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        // SAFETY: as above.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::V) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::V>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, mut c: Self::V) -> Self::V {
        for i in 0..LANES {
            c[i] += a[i] * b[i];
        }
        c
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, mut b: Self::V) -> Self::V {
        for i in 0..LANES {
            b[i] += a[i];
        }
        b
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, mut b: Self::V) -> Self::V {
        for i in 0..LANES {
            b[i] *= a[i];
        }
        b
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const bf16, phase: usize) -> Self::Pairs {
        // SAFETY: as above.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        pairs.map(|pair| f32::from_bits(if phase == 0 { pair & 0xffff_0000 } else { pair << 16 }))
    }
    #[inline(always)]
    unsafe fn splat_pair(from: *const u32) -> Self::Pairs {
        // SAFETY: the caller's contract.
        [f32::from_bits(unsafe { *from }); LANES]
    }
    #[inline(always)]
    unsafe fn dot_pairs(a: Self::Pairs, b: Self::Pairs, c: Self::V) -> Self::V {
        // SAFETY: the caller's contract.
        unsafe { Self::mul_add(a, b, c) }
    }
    #[inline(always)]
    unsafe fn zero_ints() -> Self::Ints {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn ints_to_floats(x: Self::Ints) -> Self::V {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn load_quads(from: *const u8) -> Self::Quads {
        // SAFETY: as above.
        unsafe { from.cast::<Self::Quads>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_quad(from: *const u32) -> Self::Quad {
        // SAFETY: as above.
        unsafe { *from }.to_ne_bytes().map(|byte| byte as i8)
    }
    #[inline(always)]
    unsafe fn dot_quads(a: Self::Quads, b: Self::Quad, mut c: Self::Ints) -> Self::Ints {
        for i in 0..LANES {
            for j in 0..4 {
                c[i] += i32::from(a[i][j]) * i32::from(b[j]);
            }
        }
        c
    }
}

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_a_few_units_in_the_last_place() {
        let mut x = -87.0_f32;
        while x < 87.0 {
            let mut lanes: [f32; LANES] = std::array::from_fn(|i| x + i as f32 * 0.001);
            let exact = lanes.map(|v| f64::from(v).exp());
            exp(&mut lanes);
            for (got, want) in lanes.iter().zip(exact) {
                assert!((f64::from(*got) / want - 1.0).abs() < 3e-7, "{x}: {got} {want}");
            }
            x += 0.37;
        }
        let mut special = [f32::NEG_INFINITY; LANES];
        special[1] = -1e30;
        special[2] = f32::NAN;
        special[3] = 0.0;
        exp(&mut special);
        assert!(special[0] == 0.0 && special[1] == 0.0 && special[2].is_nan() && special[3] == 1.0);
    }
}
