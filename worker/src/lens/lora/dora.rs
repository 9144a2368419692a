//! What DoRA needs of the base: for every output the square of its row of the matrix, of the delta, and their product.
//!
//! Made once, when a lens is loaded, from the weights as the base computes with them, whatever their dtype.

use std::ops::ControlFlow;

use super::layout::magnitude_tensor;
use crate::engine::arena::Region;
use crate::lens::{LensError, LensLayout};
use crate::model::lora::{Delta, DeltaPart, GainVectors, Site, modules};
use crate::model::tensor_file::TensorFileError;
use crate::model::weights::{FilledBase, Vector};
use turret_kernels::finish::squares;
use turret_kernels::rows::{add_scaled, widen};

/// Writes the numbers of all gains into a region whose tensors are in place. `proceed` is asked now and then.
pub(super) fn measure(
    layout: &LensLayout,
    base: &FilledBase,
    region: &mut Region,
    proceed: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<(), LensError> {
    for (layer, sites) in layout.deltas.layers.iter().enumerate() {
        for (site, delta) in Site::ALL.iter().zip(sites) {
            for part in delta.iter().flat_map(|delta| &delta.parts) {
                let (Some(delta), Some(gain)) = (delta, part.gain) else { continue };
                if proceed().is_break() {
                    return Err(LensError::File(TensorFileError::Cancelled));
                }
                let numbers = measure_part((base, layer, *site), delta, part, region);
                if numbers.iter().any(|[base, cross, delta]| {
                    let square = base + cross + delta;
                    !(square.is_normal() && square > 0.0)
                }) {
                    return Err(no_direction(base, layer, *site, part));
                }
                write(region, &gain, &numbers);
            }
        }
    }
    Ok(())
}

fn measure_part(
    (base, layer, site): (&FilledBase, usize, Site),
    delta: &Delta,
    part: &DeltaPart,
    region: &Region,
) -> Vec<[f32; 3]> {
    let inputs = delta.a.inputs;
    let (ranks, outputs) = (part.b.outputs, part.b.inputs);
    let (a, b) = (delta.a.of(region.bytes()), part.b.of(region.bytes()));
    let mut all_a = vec![0.0; ranks * inputs];
    for (rank, row) in all_a.chunks_exact_mut(inputs).enumerate() {
        widen(a, part.rank_start + rank, row);
    }
    let mut all_b = vec![0.0; ranks * outputs];
    for (rank, row) in all_b.chunks_exact_mut(outputs).enumerate() {
        widen(b, rank, row);
    }
    let (mut w, mut d) = (vec![0.0; inputs], vec![0.0; inputs]);
    (0..outputs)
        .map(|output| {
            base.row(layer, site, part.output_start + output, &mut w);
            d.fill(0.0);
            for rank in 0..ranks {
                let scale = part.scale * all_b[rank * outputs + output];
                add_scaled(turret_kernels::matmul::Weight::F32(&all_a), rank, scale, &mut d);
            }
            let [base, cross, delta] = squares(&w, &d);
            [base as f32, (2.0 * cross) as f32, delta as f32]
        })
        .collect()
}

fn write(region: &mut Region, gain: &GainVectors, numbers: &[[f32; 3]]) {
    let mut put = |vector: &Vector, index: usize| {
        let to = region.bytes_mut()[vector.offset..][..vector.len * 4].as_chunks_mut::<4>().0;
        to.iter_mut().zip(numbers).for_each(|(to, from)| *to = from[index].to_ne_bytes());
    };
    put(&gain.base, 0);
    put(&gain.cross, 1);
    put(&gain.delta, 2);
}

fn no_direction(base: &FilledBase, layer: usize, site: Site, part: &DeltaPart) -> LensError {
    let modules = modules(&base.layout().config);
    let module = modules.iter().find(|m| m.site == site && m.output_start == part.output_start);
    let name = module.expect("the part was planned from it").name;
    LensError::UnsupportedTensor {
        tensor: magnitude_tensor(&format!("model.layers.{layer}.{name}")),
        why: "a row of the adapted matrix has no direction, its norm is zero or not finite",
    }
}
