//! The instruction sets of x86-64 behind [`Simd`].

use std::arch::x86_64::*;

use super::{Kernel, Simd, bf16, f16};

/// # Safety
/// The machine has AVX-512 F, BW, VL and BF16, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512_bf16<K: Kernel>(kernel: K) {
    // SAFETY: called by `launch`.
    unsafe { kernel.run::<Avx512<true>>() }
}

/// # Safety
/// The machine has AVX-512 F, BW and VL, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) {
    // SAFETY: called by `launch`.
    unsafe { kernel.run::<Avx512<false>>() }
}

/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) {
    // SAFETY: called by `launch`.
    unsafe { kernel.run::<Avx2>() }
}

/// With or without the dot product of bf16 pairs.
pub(super) struct Avx512<const BF16: bool>;

// SAFETY of the blocks below: the caller's contract of `Simd`.
impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;
    type Pairs = __m512i;
    type Quads = (__m256i, __m256i);
    type Quad = ByteQuad;
    type Ints = (__m256i, __m256i);
    const PAIR_PHASES: usize = if BF16 { 1 } else { 2 };
    const WIDE: bool = true;
    // Twenty-four sums, two weights and one input of thirty-two registers.
    const TILE_ROWS: usize = 12;
    const TILE_VECTORS: usize = 24;
    // In halves of it: twenty-four sums, two weights, an input and its size, ones and a product.
    const BYTE_TILE_ROWS: usize = 12;
    const BYTE_TILE_VECTORS: usize = 12;
    #[inline(always)]
    unsafe fn call<K: Kernel>(kernel: K) {
        unsafe { if BF16 { run_avx512_bf16(kernel) } else { run_avx512(kernel) } }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        unsafe {
            let half = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::V) {
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const bf16, phase: usize) -> Self::Pairs {
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            match (BF16, phase) {
                (true, _) => pairs,
                (false, 0) => _mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000)),
                (false, _) => _mm512_slli_epi32::<16>(pairs),
            }
        }
    }
    #[inline(always)]
    unsafe fn splat_pair(from: *const u32) -> Self::Pairs {
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn dot_pairs(a: Self::Pairs, b: Self::Pairs, c: Self::V) -> Self::V {
        unsafe {
            if BF16 {
                let (a, b) = (
                    std::mem::transmute::<__m512i, __m512bh>(a),
                    std::mem::transmute::<__m512i, __m512bh>(b),
                );
                return _mm512_dpbf16_ps(c, a, b);
            }
            _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), c)
        }
    }
    #[inline(always)]
    unsafe fn zero_ints() -> Self::Ints {
        unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }
    #[inline(always)]
    unsafe fn ints_to_floats(x: Self::Ints) -> Self::V {
        unsafe {
            let low = _mm512_castsi256_si512(x.0);
            _mm512_cvtepi32_ps(_mm512_inserti64x4::<1>(low, x.1))
        }
    }
    #[inline(always)]
    unsafe fn load_quads(from: *const u8) -> Self::Quads {
        unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn splat_quad(from: *const u32) -> Self::Quad {
        unsafe { ByteQuad::splat(from) }
    }
    #[inline(always)]
    unsafe fn dot_quads(a: Self::Quads, b: Self::Quad, c: Self::Ints) -> Self::Ints {
        unsafe { (b.dot(a.0, c.0), b.dot(a.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store_between(to: *mut f32, x: Self::V, from: f32, below: f32) -> usize {
        unsafe {
            let kept = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(from))
                & _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(below));
            // Packed in a register: some processors store a packed vector to memory lane by lane.
            _mm512_storeu_ps(to, _mm512_maskz_compress_ps(kept, x));
            kept.count_ones() as usize
        }
    }
}

/// Four signed bytes in all lanes of 256 bits, and their sizes: AVX2 multiplies unsigned bytes by signed ones only. What
/// AVX-512 has beyond that needs machines to test it on, so it does the same by halves.
#[derive(Clone, Copy)]
pub(super) struct ByteQuad {
    signed: __m256i,
    size: __m256i,
}

impl ByteQuad {
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self {
        unsafe {
            let signed = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
            Self { signed, size: _mm256_abs_epi8(signed) }
        }
    }

    /// Nothing saturates: two products of at most 127² fit sixteen bits.
    #[inline(always)]
    unsafe fn dot(self, a: __m256i, c: __m256i) -> __m256i {
        unsafe {
            let pairs = _mm256_maddubs_epi16(self.size, _mm256_sign_epi8(a, self.signed));
            _mm256_add_epi32(c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

pub(super) struct Avx2;

impl Simd for Avx2 {
    type V = (__m256, __m256);
    type Pairs = Self::V;
    type Quads = (__m256i, __m256i);
    type Quad = ByteQuad;
    type Ints = (__m256i, __m256i);
    const PAIR_PHASES: usize = 2;
    const WIDE: bool = false;
    // Five sums of two registers each, a weight, and an input in one: thirteen of sixteen. A sixth row is slower.
    const TILE_ROWS: usize = 5;
    const TILE_VECTORS: usize = 5;
    const BYTE_TILE_ROWS: usize = 4;
    const BYTE_TILE_VECTORS: usize = 4;
    #[inline(always)]
    unsafe fn call<K: Kernel>(kernel: K) {
        unsafe { run_avx2(kernel) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        unsafe {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            (
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(low))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high))),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        unsafe {
            (
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::V) {
        unsafe {
            _mm256_storeu_ps(to, x.0);
            _mm256_storeu_ps(to.add(8), x.1);
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const bf16, phase: usize) -> Self::Pairs {
        #[inline(always)]
        unsafe fn half(from: *const bf16, phase: usize) -> __m256 {
            unsafe {
                let pairs = _mm256_loadu_si256(from.cast());
                _mm256_castsi256_ps(match phase {
                    0 => _mm256_and_si256(pairs, _mm256_set1_epi32(-0x1_0000)),
                    _ => _mm256_slli_epi32::<16>(pairs),
                })
            }
        }
        unsafe { (half(from, phase), half(from.add(16), phase)) }
    }
    #[inline(always)]
    unsafe fn splat_pair(from: *const u32) -> Self::Pairs {
        unsafe { Self::splat(f32::from_bits(*from)) }
    }
    #[inline(always)]
    unsafe fn dot_pairs(a: Self::Pairs, b: Self::Pairs, c: Self::V) -> Self::V {
        unsafe { Self::mul_add(a, b, c) }
    }
    #[inline(always)]
    unsafe fn zero_ints() -> Self::Ints {
        unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }
    #[inline(always)]
    unsafe fn ints_to_floats(x: Self::Ints) -> Self::V {
        unsafe { (_mm256_cvtepi32_ps(x.0), _mm256_cvtepi32_ps(x.1)) }
    }
    #[inline(always)]
    unsafe fn load_quads(from: *const u8) -> Self::Quads {
        unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn splat_quad(from: *const u32) -> Self::Quad {
        unsafe { ByteQuad::splat(from) }
    }
    #[inline(always)]
    unsafe fn dot_quads(a: Self::Quads, b: Self::Quad, c: Self::Ints) -> Self::Ints {
        unsafe { (b.dot(a.0, c.0), b.dot(a.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
