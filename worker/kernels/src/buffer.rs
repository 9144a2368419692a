//! Buffers of activations: what a step's operations work on, allocated once for the largest step.
//!
//! A candle tensor may share its storage with others, so candle looks for overlaps at every in-place operation, and builds
//! lists for it. A buffer owns its storage and keeps the layout that it was made with: there is nothing to look for, and
//! an operation allocates nothing. The operations are candle's all the same, each with its side per device.

use std::cell::RefCell;

use candle_core::backend::BackendDevice;
use candle_core::cpu_backend::CpuDevice;
use candle_core::{CpuStorage, DType, InplaceOp1, InplaceOp2, Layout, Result, Storage, bail};

/// f32 numbers, `[rows, width]`, one row after the other. Operations of one thread take turns on it.
pub struct Buffer {
    storage: RefCell<Storage>,
    layout: Layout,
}

impl Buffer {
    /// All zero.
    pub fn zeros(rows: usize, width: usize) -> Result<Self> {
        let layout = Layout::contiguous((rows, width));
        let storage = Storage::Cpu(CpuDevice.zeros_impl(layout.shape(), DType::F32)?);
        Ok(Self { storage: RefCell::new(storage), layout })
    }

    /// Numbers of a row.
    pub fn width(&self) -> usize {
        self.layout.dims()[1]
    }

    /// Applies an operation.
    pub fn inplace_op1(&self, op: &impl InplaceOp1) -> Result<()> {
        match &mut *self.storage.borrow_mut() {
            Storage::Cpu(storage) => op.cpu_fwd(storage, &self.layout),
            Storage::Cuda(storage) => op.cuda_fwd(storage, &self.layout),
            Storage::Metal(_) => bail!("{}: no metal device is served", op.name()),
        }
    }

    /// Applies an operation that reads another buffer.
    pub fn inplace_op2(&self, from: &Self, op: &impl InplaceOp2) -> Result<()> {
        let (layout, other) = (&self.layout, &from.layout);
        match (&mut *self.storage.borrow_mut(), &*from.storage.borrow()) {
            (Storage::Cpu(to), Storage::Cpu(from)) => op.cpu_fwd(to, layout, from, other),
            (Storage::Cuda(to), Storage::Cuda(from)) => op.cuda_fwd(to, layout, from, other),
            _ => bail!("{}: the buffers of a step are on one device", op.name()),
        }
    }

    /// Reads the numbers, where they are in this machine's memory.
    pub fn with_numbers<T>(&self, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
        match &*self.storage.borrow() {
            Storage::Cpu(CpuStorage::F32(numbers)) => Ok(read(numbers)),
            _ => bail!("the buffer is not in the machine's memory"),
        }
    }
}
