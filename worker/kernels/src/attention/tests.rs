//! Attention against its formula, and every query against itself alone.

use super::*;

/// Two stretches and a part of a third.
const POSITIONS: usize = 2 * STRETCH + 43;
/// Queries of the last call: enough that some share a tile.
const TOGETHER: usize = 150;

/// Numbers between -1 and 1 that follow from a seed.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

#[repr(align(64))]
#[derive(Clone, Copy)]
struct CacheLine(#[allow(dead_code, reason = "it is read as bytes")] [u8; 64]);

/// One row, and where its blocks lie.
struct Row {
    shape: CacheShape,
    table: Vec<u32>,
    bytes: Vec<CacheLine>,
    keys: Vec<f32>,
    values: Vec<f32>,
    qkv: Vec<f32>,
}

impl Row {
    /// `stride` is prime to the number of blocks and moves them about. What the row does not write is not a number.
    fn new(shape: CacheShape, stride: usize) -> Self {
        let blocks = POSITIONS.div_ceil(BLOCK_TOKENS);
        let table: Vec<u32> = (0..blocks).map(|i| (i * stride % blocks) as u32).collect();
        let mut bytes = vec![CacheLine([0xff; 64]); blocks * shape.block_bytes() / 64 + 1];
        let width = shape.kv_heads * shape.head_dim;
        let (keys, values) = (numbers(1, POSITIONS * width), numbers(2, POSITIONS * width));
        let cache = CacheBlocks::new(shape, as_bytes(&mut bytes));
        for (position, (k, v)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let block = table[position / BLOCK_TOKENS];
            cache.store(1, block, position % BLOCK_TOKENS, k, v);
        }
        let qkv = numbers(3, POSITIONS * shape.qkv_width());
        Self { shape, table, bytes, keys, values, qkv }
    }

    /// Results of some positions, computed in one call.
    fn attend(&mut self, positions: Range<usize>, scoring: Scoring) -> Vec<f32> {
        let mut out = vec![f32::NAN; positions.len() * self.shape.q_width()];
        let queries: Vec<Query> =
            positions.clone().map(|position| Query { position: position as u32, table_start: 0 }).collect();
        let qkv = &self.qkv[positions.start * self.shape.qkv_width()..];
        let cache = CacheBlocks::new(self.shape, as_bytes(&mut self.bytes));
        attention(&Pool::new(1), &cache, (1, scoring), &queries, &self.table, qkv, &mut out);
        out
    }

    /// One head of one query, by the formula.
    fn expected(&self, position: usize, head: usize, scoring: Scoring) -> Vec<f64> {
        let (shape, d) = (self.shape, self.shape.head_dim);
        let kept = |x: f32| match shape.dtype {
            Dtype::F32 => f64::from(x),
            Dtype::BF16 => bf16::from_f32(x).to_f64(),
            Dtype::F16 => f16::from_f32(x).to_f64(),
        };
        let q = &self.qkv[position * shape.qkv_width() + head * d..][..d];
        let at = |numbers: &[f32], t: usize, i: usize| {
            kept(numbers[(t * shape.kv_heads + head / shape.group) * d + i])
        };
        let first = scoring.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
        let scores = (first..=position).map(|t| {
            let product: f64 = (0..d).map(|i| f64::from(q[i]) * at(&self.keys, t, i)).sum();
            let score = product * f64::from(scoring.scale);
            scoring.soft_cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
        });
        let weights: Vec<f64> = scores.map(f64::exp).collect();
        let sum: f64 = weights.iter().sum();
        let value = |i| weights.iter().zip(first..).map(|(w, t)| w * at(&self.values, t, i)).sum::<f64>();
        (0..d).map(|i| value(i) / sum).collect()
    }
}

fn as_bytes(lines: &mut [CacheLine]) -> &mut [u8] {
    // SAFETY: a line is 64 bytes, all of them numbers.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 64) }
}

/// Shapes whose lines fill tiles in all ways, and heads that are no whole vectors.
fn shapes() -> impl Iterator<Item = CacheShape> {
    let shape =
        |(kv_heads, group, head_dim, dtype)| CacheShape { layers: 2, kv_heads, group, head_dim, dtype };
    [
        (2, 7, 64, Dtype::BF16),
        (3, 1, 32, Dtype::F32),
        (1, 2, 80, Dtype::F16),
        (2, 3, 10, Dtype::F32),
        (1, 5, 24, Dtype::BF16),
        (1, 64, 16, Dtype::F32),
    ]
    .into_iter()
    .map(shape)
}

fn scorings(head_dim: usize) -> impl Iterator<Item = Scoring> {
    let scale = 2.0 / (head_dim as f32).sqrt();
    let windows = [None, Some(1), Some(3), Some(21), Some(128), Some(200), Some(5000)];
    windows.into_iter().zip([None, Some(5.0)].into_iter().cycle()).map(move |(window, soft_cap)| Scoring {
        scale,
        soft_cap,
        window,
    })
}

#[test]
fn results_follow_the_formula() {
    for shape in shapes() {
        let mut row = Row::new(shape, 5);
        for scoring in scorings(shape.head_dim) {
            let from = POSITIONS - TOGETHER;
            let out = row.attend(from..POSITIONS, scoring);
            for position in (from..POSITIONS).step_by(7).chain([POSITIONS - 1]) {
                for head in 0..shape.kv_heads * shape.group {
                    let width = shape.q_width();
                    let found = &out[(position - from) * width + head * shape.head_dim..][..shape.head_dim];
                    for (found, exact) in found.iter().zip(row.expected(position, head, scoring)) {
                        assert!(
                            (f64::from(*found) - exact).abs() < 4e-6,
                            "{shape:?}, {scoring:?}, position {position}: {found}, {exact}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_query_has_the_bits_it_has_alone_wherever_its_blocks_lie() {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for shape in shapes() {
        let (mut here, mut there) = (Row::new(shape, 5), Row::new(shape, 8));
        for scoring in scorings(shape.head_dim) {
            let from = POSITIONS - TOGETHER;
            let all = here.attend(from..POSITIONS, scoring);
            for (position, all) in (from..).zip(all.chunks_exact(shape.q_width())) {
                let alone = there.attend(position..position + 1, scoring);
                assert_eq!(bits(all), bits(&alone), "{shape:?}, {scoring:?}, position {position}");
            }
        }
    }
}
