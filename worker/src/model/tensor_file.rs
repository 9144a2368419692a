//! Safetensors files, read by position: nothing is mapped, so a file that is cut short while it is being read is an
//! error and not a signal.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype as Stored, Metadata, TensorInfo};

use super::tensor_header;
use super::weights::Dtype;

/// The largest header that is read: room for a hundred thousand tensors.
const MAX_HEADER_BYTES: u64 = 32 << 20;
/// How much is read at a time: small enough that what was read is still in the cache when it is checked.
const CHUNK_BYTES: usize = 1 << 20;

/// Bytes of a file of `size` bytes before its first tensor, as `start` tells, the first bytes of it. Eight of them tell how
/// long the header is; of one that is too long to be read, no more counts.
pub fn head_bytes(start: &[u8], size: u64) -> u64 {
    let header = start.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length));
    let header = if header > MAX_HEADER_BYTES { 0 } else { header };
    (8 + header).min(size)
}

/// Why a tensor file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// The operating system refused.
    #[error("failed to read `{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file ends before what its header promises.
    #[error("`{path}` is truncated: {found} bytes of {expected}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes there.
        found: u64,
        /// Bytes promised.
        expected: u64,
    },
    /// The header is not what the format says.
    #[error("`{path}` is malformed: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A tensor has numbers of a kind that is not read.
    #[error("tensor `{tensor}` in `{path}` is stored as {dtype}; F32, F16 and BF16 are supported")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
    },
    /// A tensor holds an infinity or not-a-number, or a number that the wanted dtype cannot hold.
    #[error("tensor `{tensor}` in `{path}` has a value that is not finite as {dtype}, at element {element}")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Dtype after conversion.
        dtype: Dtype,
        /// First such element.
        element: u64,
    },
    /// The caller asked to stop.
    #[error("loading was cancelled")]
    Cancelled,
}

/// How far a load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written so far.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

impl Progress {
    /// In whole percent.
    pub fn percent(&self) -> u8 {
        (self.done_bytes * 100).checked_div(self.total_bytes).unwrap_or(100).min(100) as u8
    }
}

/// What a loader tells while it works; `ControlFlow::Break` cancels it.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// An open safetensors file whose header has been checked against its length.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    metadata: Metadata,
}

impl TensorFile {
    /// Opens and checks the header: its size, JSON, overlaps and gaps of offsets, shapes, the file's length.
    pub fn open(path: &Path) -> Result<Self, TensorFileError> {
        let io = |source| TensorFileError::Io { path: path.into(), source };
        let malformed = |what: String| TensorFileError::Malformed { path: path.into(), what };
        let file = super::file::open(path).map_err(io)?;
        let found = file.metadata().map_err(io)?.len();
        let truncated = |expected| TensorFileError::Truncated { path: path.into(), found, expected };
        if found < 8 {
            return Err(truncated(8));
        }
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(malformed(format!(
                "its header claims {header_bytes} bytes, {MAX_HEADER_BYTES} is the most"
            )));
        }
        if found < 8 + header_bytes {
            return Err(truncated(8 + header_bytes));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact_at(&mut header, 8).map_err(io)?;
        let metadata = tensor_header::parse(&header).map_err(|e| malformed(format!("header: {e}")))?;
        let expected = (8 + header_bytes).saturating_add(metadata.data_len() as u64);
        if found < expected {
            return Err(truncated(expected));
        }
        if found > expected {
            return Err(malformed(format!("{} bytes follow the last tensor", found - expected)));
        }
        Ok(Self { path: path.into(), file, data_start: 8 + header_bytes, metadata })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, in the order of the file.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Shape of a tensor.
    pub fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.metadata.info(tensor).map(|info| info.shape.as_slice())
    }

    /// Dtype of a tensor that is in this file.
    pub fn dtype(&self, tensor: &str) -> Result<Dtype, TensorFileError> {
        let info = self.info(tensor)?;
        match info.dtype {
            Stored::F32 => Ok(Dtype::F32),
            Stored::F16 => Ok(Dtype::F16),
            Stored::BF16 => Ok(Dtype::BF16),
            other => Err(TensorFileError::Dtype {
                path: self.path.clone(),
                tensor: tensor.into(),
                dtype: format!("{other:?}"),
            }),
        }
    }

    fn info(&self, tensor: &str) -> Result<&TensorInfo, TensorFileError> {
        self.metadata.info(tensor).ok_or_else(|| TensorFileError::Malformed {
            path: self.path.clone(),
            what: format!("tensor `{tensor}` is not in it"),
        })
    }

    /// Reads a whole tensor into `to`, converted to `dtype`, refusing what is not finite. `written` is told the bytes
    /// written after every chunk.
    pub fn read(
        &self,
        tensor: &str,
        dtype: Dtype,
        to: &mut [u8],
        written: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), TensorFileError> {
        let mut reader = self.reader(tensor, dtype)?;
        let chunk_elements = CHUNK_BYTES / reader.stored.bytes();
        for out in to.chunks_mut(chunk_elements * dtype.bytes()) {
            reader.next(out)?;
            if written(out.len() as u64).is_break() {
                return Err(TensorFileError::Cancelled);
            }
        }
        Ok(())
    }

    /// Reads a tensor in order, converted to `dtype`, refusing what is not finite, and hands it over by chunks of some
    /// whole rows of `row_elements`.
    pub fn read_rows(
        &self,
        tensor: &str,
        dtype: Dtype,
        row_elements: usize,
        take: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), TensorFileError> {
        let mut reader = self.reader(tensor, dtype)?;
        let row_bytes = row_elements * dtype.bytes();
        let mut left: usize = self.info(tensor)?.shape.iter().product::<usize>() * dtype.bytes();
        let mut chunk = vec![0; (CHUNK_BYTES / row_bytes.max(1)).max(1) * row_bytes];
        while left > 0 {
            let rows = &mut chunk[..left.min((CHUNK_BYTES / row_bytes).max(1) * row_bytes)];
            reader.next(rows)?;
            left -= rows.len();
            if take(rows).is_break() {
                return Err(TensorFileError::Cancelled);
            }
        }
        Ok(())
    }

    fn reader<'a>(&'a self, tensor: &'a str, dtype: Dtype) -> Result<Reader<'a>, TensorFileError> {
        let stored = self.dtype(tensor)?;
        let (start, _) = self.info(tensor)?.data_offsets;
        let position = self.data_start + start as u64;
        Ok(Reader { file: self, tensor, stored, dtype, position, element: 0, buffer: Vec::new() })
    }

    fn read_at(&self, to: &mut [u8], position: u64) -> Result<(), TensorFileError> {
        self.file.read_exact_at(to, position).map_err(|source| match source.kind() {
            // It had this length when it was opened.
            std::io::ErrorKind::UnexpectedEof => {
                let found = self.file.metadata().map_or(0, |m| m.len());
                TensorFileError::Truncated {
                    path: self.path.clone(),
                    found,
                    expected: position + to.len() as u64,
                }
            }
            _ => TensorFileError::Io { path: self.path.clone(), source },
        })
    }
}

/// A tensor that is read in order.
struct Reader<'a> {
    file: &'a TensorFile,
    tensor: &'a str,
    stored: Dtype,
    dtype: Dtype,
    position: u64,
    element: u64,
    buffer: Vec<u8>,
}

impl Reader<'_> {
    /// The next elements, as many as `out` has room for.
    fn next(&mut self, out: &mut [u8]) -> Result<(), TensorFileError> {
        let bytes = out.len() / self.dtype.bytes() * self.stored.bytes();
        if self.stored == self.dtype {
            self.file.read_at(out, self.position)?;
        } else {
            self.buffer.resize(bytes, 0);
            self.file.read_at(&mut self.buffer, self.position)?;
            convert(&self.buffer, self.stored, out, self.dtype);
        }
        if let Some(element) = first_not_finite(out, self.dtype) {
            return Err(TensorFileError::NotFinite {
                path: self.file.path.clone(),
                tensor: self.tensor.into(),
                dtype: self.dtype,
                element: self.element + element as u64,
            });
        }
        self.position += bytes as u64;
        self.element += (out.len() / self.dtype.bytes()) as u64;
        Ok(())
    }
}

/// Converts whole elements. Narrowing rounds to nearest even.
fn convert(from: &[u8], stored: Dtype, to: &mut [u8], dtype: Dtype) {
    fn each<const F: usize, const T: usize>(from: &[u8], to: &mut [u8], f: impl Fn([u8; F]) -> [u8; T]) {
        for (from, to) in from.as_chunks::<F>().0.iter().zip(to.as_chunks_mut::<T>().0) {
            *to = f(*from);
        }
    }
    use Dtype::{BF16, F16, F32};
    match (stored, dtype) {
        (BF16, F32) => each(from, to, |b| bf16::from_le_bytes(b).to_f32().to_le_bytes()),
        (F16, F32) => each(from, to, |b| f16::from_le_bytes(b).to_f32().to_le_bytes()),
        (F32, BF16) => each(from, to, |b| bf16::from_f32(f32::from_le_bytes(b)).to_le_bytes()),
        (F32, F16) => each(from, to, |b| f16::from_f32(f32::from_le_bytes(b)).to_le_bytes()),
        (F16, BF16) => each(from, to, |b| bf16::from_f32(f16::from_le_bytes(b).to_f32()).to_le_bytes()),
        (BF16, F16) => each(from, to, |b| f16::from_f32(bf16::from_le_bytes(b).to_f32()).to_le_bytes()),
        (F32, F32) | (F16, F16) | (BF16, BF16) => to.copy_from_slice(from),
    }
}

/// The first element whose exponent is all ones.
fn first_not_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> {
    fn find<const N: usize>(bytes: &[u8], special: impl Fn([u8; N]) -> bool) -> Option<usize> {
        let elements = bytes.as_chunks::<N>().0;
        // First without an early exit, which the compiler turns into vector code.
        if !elements.iter().fold(false, |found, &b| found | special(b)) {
            return None;
        }
        elements.iter().position(|&b| special(b))
    }
    match dtype {
        Dtype::F32 => find(bytes, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::BF16 => find(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::F16 => find(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Writes a safetensors file: name → (dtype, shape, bytes).
    pub(crate) fn write(path: &Path, tensors: &BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>) {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, (dtype, shape, bytes)) in tensors {
            let end = data.len() + bytes.len();
            header.insert(
                name.clone(),
                serde_json::json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [data.len(), end]}),
            );
            data.extend_from_slice(bytes);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(data);
        std::fs::write(path, file).unwrap();
    }

    fn file_with(values: &[f32]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        write(&path, &BTreeMap::from([("x".to_owned(), (Dtype::F32, vec![values.len()], bytes))]));
        (dir, path)
    }

    fn read(path: &Path, dtype: Dtype, elements: usize) -> Result<Vec<u8>, TensorFileError> {
        let mut to = vec![0; elements * dtype.bytes()];
        TensorFile::open(path)?.read("x", dtype, &mut to, &mut |_| ControlFlow::Continue(()))?;
        Ok(to)
    }

    #[test]
    fn conversions_go_through_the_exact_value() {
        let (_dir, path) = file_with(&[1.0, -2.5, 3.0e-3]);
        let f32s = read(&path, Dtype::F32, 3).unwrap();
        assert_eq!(f32::from_le_bytes(f32s[4..8].try_into().unwrap()), -2.5);
        let bf16s = read(&path, Dtype::BF16, 3).unwrap();
        assert_eq!(bf16::from_le_bytes([bf16s[4], bf16s[5]]), bf16::from_f32(3.0e-3));
        let f16s = read(&path, Dtype::F16, 3).unwrap();
        assert_eq!(f16::from_le_bytes([f16s[2], f16s[3]]).to_f32(), -2.5);
    }

    #[test]
    fn values_that_are_not_finite_are_refused_where_they_are() {
        let (_dir, path) = file_with(&[1.0, f32::NAN]);
        let error = read(&path, Dtype::F32, 2).unwrap_err();
        assert!(matches!(error, TensorFileError::NotFinite { element: 1, .. }), "{error}");
        let (_dir, path) = file_with(&[70000.0]);
        let error = read(&path, Dtype::F16, 1).unwrap_err();
        assert!(matches!(error, TensorFileError::NotFinite { element: 0, dtype: Dtype::F16, .. }), "{error}");
    }

    #[test]
    fn the_first_bytes_tell_where_the_tensors_begin() {
        let told = |header: u64, size| head_bytes(&header.to_le_bytes(), size);
        assert_eq!((told(100, 1000), told(100, 50), told(0, 1000)), (108, 50, 8));
        assert_eq!((told(MAX_HEADER_BYTES + 1, 1 << 40), told(u64::MAX, 4)), (8, 4), "it is not read");
        assert_eq!((head_bytes(&[1; 7], 1000), head_bytes(&[], 3)), (8, 3), "not told yet");
    }

    #[test]
    fn damaged_files_are_named_errors() {
        let (_dir, path) = file_with(&[1.0; 64]);
        let good = std::fs::read(&path).unwrap();
        for cut in [0, 7, 8, 20, good.len() - 1] {
            std::fs::write(&path, &good[..cut]).unwrap();
            let error = TensorFile::open(&path).err().unwrap();
            assert!(matches!(error, TensorFileError::Truncated { .. }), "cut at {cut}: {error}");
        }
        let with_header = |header: &str| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([0; 8]);
            bytes
        };
        for bytes in [
            [&good[..], b"more"].concat(),
            [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
            with_header("not json"),
            with_header("[]"),
            // Overlap, a gap, a shape that does not match, a shape that overflows, offsets that run backwards.
            with_header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            ),
            with_header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#),
            with_header(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#),
            with_header(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}"#),
            with_header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = TensorFile::open(&path).err().unwrap();
            assert!(matches!(error, TensorFileError::Malformed { .. }), "{error}");
        }
    }

    #[test]
    fn a_file_cut_while_it_is_read_is_truncated() {
        let (_dir, path) = file_with(&[1.0; 64]);
        let file = TensorFile::open(&path).unwrap();
        std::fs::write(&path, b"gone").unwrap();
        let error =
            file.read("x", Dtype::F32, &mut [0; 256], &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert!(matches!(error, TensorFileError::Truncated { .. }), "{error}");
    }
}
