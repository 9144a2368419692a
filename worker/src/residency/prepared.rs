//! Prepared files: weights on disk as they lie in device memory, so that what has left it comes back by reading one file
//! from its beginning to its end.
//!
//! ```text
//! magic, length of the header (u32), header (JSON), zeros up to a page
//! the region, byte for byte
//! for each CHUNK of it a checksum, then the header's own (u64, little-endian; XXH3)
//! ```
//!
//! A prepared file is made of the files that were checked, and is never the authority: one that is missing, of other
//! weights, truncated or altered is as good as none. It is removed, and the weights come from the files again.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use twox_hash::XxHash3_64;

use crate::engine::arena::Region;
use crate::lens::{FilledLens, LensLayout};
use crate::model::config::ModelConfig;
use crate::model::weights::{Dtype, Quantization};
use turret_kernels::simd::InstructionSet;

/// Changes whenever the same files would lie otherwise in memory, or the format changes. A test notices.
pub const LAYOUT_VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"turret-p";
/// Where the region starts: a multiple of this.
const PAGE: u64 = 4096;
/// Bytes under one checksum: what is read at once, and checked while it is in the processor's cache.
const CHUNK: usize = 1 << 20;
/// Longest header that is read.
const MAX_HEADER: u32 = 64 << 20;
/// Threads that read one file, at most: more than these wait for the disk.
const READERS: usize = 4;
/// Chunks that are worth a further thread.
const CHUNKS_PER_READER: usize = 16;

/// Which weights, in which form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity(String);

impl Identity {
    /// A base, by the digest of its files.
    pub fn of_base(digest: &str, dtype: Dtype, quantization: Quantization) -> Self {
        Self(format!("{digest} {dtype} {quantization:?}"))
    }

    /// A lens, by the digest of its files, over a base: some of what it needs is made of both.
    pub fn of_lens(digest: &str, base: &Self) -> Self {
        // Sums of the base's numbers are rounded as the instruction set does.
        Self(format!("{digest} over {} {:?}", base.0, InstructionSet::get()))
    }

    /// Name of the prepared file.
    pub fn file_name(&self) -> String {
        hex::encode(Sha256::digest(format!("{LAYOUT_VERSION} {}", self.0)))
    }
}

/// Digest of a layout, by which a lens's files and its prepared file agree.
pub fn layout_digest(layout: &str) -> String {
    hex::encode(Sha256::digest(layout))
}

/// Why a prepared file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// It is not what was written.
    #[error("{0}")]
    Altered(&'static str),
}

impl Unusable {
    /// Whether the file is to blame, rather than what it was read with.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Altered(_) => true,
            Self::Io(error) => error.kind() == io::ErrorKind::UnexpectedEof,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    identity: String,
    /// Of the region.
    bytes: u64,
    /// Where everything is in it, in the words of whoever wrote it.
    layout: String,
}

/// A prepared file that is there and whole as far as its header tells.
#[derive(Debug)]
pub struct Prepared {
    file: File,
    layout: String,
    bytes: u64,
    /// Where the region starts.
    start: u64,
    checksums: Vec<u64>,
}

impl Prepared {
    /// Opens the prepared file of these weights. `None` when there is none.
    pub fn open(path: &Path, identity: &Identity) -> Result<Option<Self>, Unusable> {
        let file = match crate::model::file::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let length = file.metadata()?.len();
        let mut start = [0; 12];
        file.read_exact_at(&mut start, 0)?;
        let (magic, header_bytes) = start.split_at(MAGIC.len());
        let header_bytes = u32::from_le_bytes(header_bytes.try_into().expect("four bytes"));
        if magic != MAGIC || header_bytes > MAX_HEADER {
            return Err(Unusable::Altered("it does not begin as a prepared file does"));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact_at(&mut header, start.len() as u64)?;
        let sum = XxHash3_64::oneshot(&header);
        let header: Header =
            serde_json::from_slice(&header).map_err(|_| Unusable::Altered("its header is no JSON"))?;
        if header.version != LAYOUT_VERSION || header.identity != identity.0 {
            return Err(Unusable::Altered("it holds other weights"));
        }
        let start = (start.len() as u64 + u64::from(header_bytes)).next_multiple_of(PAGE);
        let chunks = header.bytes.div_ceil(CHUNK as u64);
        let whole = chunks.checked_add(1).and_then(|sums| sums.checked_mul(8));
        let whole = whole.and_then(|sums| sums.checked_add(header.bytes)?.checked_add(start));
        if whole != Some(length) {
            return Err(Unusable::Altered("its length is not what its header says"));
        }
        let mut sums = vec![0; chunks as usize * 8 + 8];
        file.read_exact_at(&mut sums, start + header.bytes)?;
        let mut checksums: Vec<u64> =
            sums.as_chunks::<8>().0.iter().map(|sum| u64::from_le_bytes(*sum)).collect();
        if checksums.pop() != Some(sum) {
            return Err(Unusable::Altered("its header was altered"));
        }
        // The time of last use. Whoever may read it but not touch it still reads it.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(Self { file, layout: header.layout, bytes: header.bytes, start, checksums }))
    }

    /// Where everything is in the region, in the words of whoever wrote it.
    pub fn layout(&self) -> &str {
        &self.layout
    }

    /// Bytes of the region.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads the region and checks it, on a few threads when it is large. `on_percent` is told how far it is.
    pub fn read(&self, region: &mut [u8], on_percent: &(dyn Fn(u8) + Sync)) -> Result<(), Unusable> {
        assert_eq!(region.len() as u64, self.bytes, "the region was reserved for this layout");
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let readers = (self.checksums.len() / CHUNKS_PER_READER).clamp(1, READERS.min(processors));
        let chunks = Mutex::new(region.chunks_mut(CHUNK).zip(&self.checksums).enumerate());
        let done = AtomicU64::new(0);
        let read = || {
            loop {
                let next = chunks.lock().next();
                let Some((number, (chunk, checksum))) = next else { return Ok(()) };
                self.file.read_exact_at(chunk, self.start + (number * CHUNK) as u64)?;
                if XxHash3_64::oneshot(chunk) != *checksum {
                    return Err(Unusable::Altered("what it holds was altered"));
                }
                let done = done.fetch_add(chunk.len() as u64, Ordering::Relaxed) + chunk.len() as u64;
                on_percent((done * 100 / self.bytes.max(1)) as u8);
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..readers).map(|_| scope.spawn(read)).collect();
            let mut result = read();
            for other in others {
                result = result.and(other.join().expect("reading does not panic"));
            }
            result
        })
    }
}

/// A prepared file that holds a lens.
#[derive(Debug)]
pub struct PreparedLens {
    prepared: Prepared,
    layout: LensLayout,
}

impl PreparedLens {
    /// Takes a prepared file as that of a lens.
    ///
    /// # Errors
    /// When what is in it is not laid out as a lens of its length.
    pub fn new(prepared: Prepared) -> Result<Self, Unusable> {
        let layout = serde_json::from_str::<LensLayout>(prepared.layout()).ok();
        let layout = layout.filter(|layout| layout.bytes == prepared.bytes());
        let layout = layout.ok_or(Unusable::Altered("its layout is another one"))?;
        Ok(Self { prepared, layout })
    }

    /// What a region for it is reserved by.
    pub fn layout(&self) -> &LensLayout {
        &self.layout
    }

    /// Fills such a region, for a base of this architecture. `on_percent` is told how far it is.
    ///
    /// # Errors
    /// When the file cannot be read, or is not what was written.
    pub fn fill(
        self,
        base: Arc<ModelConfig>,
        mut region: Region,
        on_percent: &(dyn Fn(u8) + Sync),
    ) -> Result<FilledLens, Unusable> {
        self.prepared.read(region.bytes_mut(), on_percent)?;
        Ok(FilledLens::new(base, self.layout, region))
    }
}

/// Writes the prepared file of a region, unless it is told to stop. Tells whether it is whole.
///
/// Not synced: after a loss of power the checksums tell whether it is.
pub fn write(
    mut file: impl Write,
    identity: &Identity,
    layout: String,
    region: &[u8],
    stop: &CancellationToken,
) -> io::Result<bool> {
    let header =
        Header { version: LAYOUT_VERSION, identity: identity.0.clone(), bytes: region.len() as u64, layout };
    let header = serde_json::to_vec(&header)?;
    file.write_all(MAGIC)?;
    file.write_all(&u32::try_from(header.len()).map_err(io::Error::other)?.to_le_bytes())?;
    file.write_all(&header)?;
    let so_far = (MAGIC.len() + 4 + header.len()) as u64;
    file.write_all(&vec![0; (so_far.next_multiple_of(PAGE) - so_far) as usize])?;
    let mut checksums = Vec::with_capacity(region.len().div_ceil(CHUNK) * 8 + 8);
    for chunk in region.chunks(CHUNK) {
        if stop.is_cancelled() {
            return Ok(false);
        }
        checksums.extend(XxHash3_64::oneshot(chunk).to_le_bytes());
        file.write_all(chunk)?;
    }
    checksums.extend(XxHash3_64::oneshot(&header).to_le_bytes());
    file.write_all(&checksums)?;
    file.flush()?;
    Ok(true)
}

/// Bytes of the prepared file of a region, with what is around it, at most.
pub fn file_bytes(region: u64, layout: &str) -> u64 {
    // JSON may write a quote of the layout as two bytes.
    let header = 2 * layout.len() as u64 + PAGE;
    region + region.div_ceil(CHUNK as u64) * 8 + 8 + header + PAGE
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::engine::arena::{Arena, Part};
    use crate::lens::lora::LoraFolder;
    use crate::model::weights::BaseFolder;

    fn identity(digest: &str) -> Identity {
        Identity::of_base(digest, Dtype::BF16, Quantization::None)
    }

    fn region(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i * 31 % 251) as u8).collect()
    }

    fn goes_on() -> CancellationToken {
        CancellationToken::new()
    }

    fn read(path: &Path, of: &Identity) -> Result<Option<Vec<u8>>, Unusable> {
        let Some(prepared) = Prepared::open(path, of)? else { return Ok(None) };
        let mut found = vec![0; prepared.bytes() as usize];
        prepared.read(&mut found, &|_| {})?;
        Ok(Some(found))
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        for bytes in [0, 1, CHUNK - 1, CHUNK, 40 * CHUNK + 7] {
            let region = region(bytes);
            assert!(
                write(File::create(&path).unwrap(), &identity("a"), "{\"x\": 1}".into(), &region, &goes_on())
                    .unwrap()
            );
            let prepared = Prepared::open(&path, &identity("a")).unwrap().unwrap();
            assert_eq!((prepared.layout(), prepared.bytes()), ("{\"x\": 1}", bytes as u64));
            let percent = AtomicU64::new(0);
            let mut found = vec![0; bytes];
            prepared
                .read(&mut found, &|now| {
                    percent.fetch_max(now.into(), Ordering::Relaxed);
                })
                .unwrap();
            assert!(found == region, "{bytes}");
            assert!(bytes == 0 || percent.into_inner() == 100);
            let length = path.metadata().unwrap().len();
            assert!(length <= file_bytes(bytes as u64, "{\"x\": 1}"), "{length}");
        }
    }

    #[test]
    fn other_weights_are_none_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        assert!(matches!(read(&path, &identity("a")), Ok(None)));
        write(File::create(&path).unwrap(), &identity("a"), String::new(), &region(10), &goes_on()).unwrap();
        assert!(matches!(read(&path, &identity("b")), Err(Unusable::Altered(_))));
        let names = [identity("a"), identity("b"), Identity::of_lens("a", &identity("b"))];
        let names: std::collections::BTreeSet<String> = names.iter().map(Identity::file_name).collect();
        assert_eq!(names.len(), 3);
    }

    #[test]
    fn writing_stops_when_it_is_told_to() {
        let stop = goes_on();
        stop.cancel();
        let mut written = Vec::new();
        assert!(!write(&mut written, &identity("a"), String::new(), &region(3 * CHUNK), &stop).unwrap());
        assert!(written.len() < CHUNK);
    }

    #[test]
    fn a_lens_comes_back_as_it_was_and_nothing_else_is_taken_for_one() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/features-qwen2");
        let arena = Arena::new(1 << 30).unwrap();
        let mut on_progress = |_| ControlFlow::Continue(());
        let base = BaseFolder::open(&fixture.join("model"), None).unwrap();
        let region = arena.reserve(Part::Base, base.layout().bytes).unwrap();
        let base = base.fill(region, &mut on_progress).unwrap();
        let lens = LoraFolder::open(&fixture.join("lenses/save-norms"), base.layout()).unwrap();
        let region = arena.reserve(Part::Lens, lens.layout().bytes).unwrap();
        let lens = lens.fill(region, &base, &mut on_progress).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let written = |layout: String, region: &[u8]| {
            write(File::create(&path).unwrap(), &identity("a"), layout, region, &goes_on()).unwrap();
            PreparedLens::new(Prepared::open(&path, &identity("a")).unwrap().unwrap())
        };
        let layout = serde_json::to_string(lens.layout()).unwrap();
        let prepared = written(layout.clone(), lens.bytes()).unwrap();
        let region = arena.reserve(Part::Lens, prepared.layout().bytes).unwrap();
        let again = prepared.fill(base.layout().config.clone(), region, &|_| {}).unwrap();
        assert!(again.layout() == lens.layout() && again.bytes() == lens.bytes());
        for (layout, region) in [(layout, &lens.bytes()[1..]), ("{}".into(), lens.bytes())] {
            assert!(matches!(written(layout, region), Err(Unusable::Altered(_))));
        }
    }

    /// What lies in memory of the fixtures. Equal files must lie equally for as long as the version is the same, or what was
    /// prepared before would be other weights.
    #[test]
    fn a_layout_that_changes_has_another_version() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity");
        let arena = Arena::new(1 << 30).unwrap();
        let mut on_progress = |_| ControlFlow::Continue(());
        let mut digest = Sha256::new();
        for (family, dtype, quantization) in [
            ("qwen2", Dtype::F32, Quantization::None),
            ("qwen2", Dtype::BF16, Quantization::None),
            ("phi3", Dtype::F16, Quantization::Q8_0),
            ("features-tied", Dtype::F32, Quantization::None),
            ("features-qwen2", Dtype::BF16, Quantization::None),
        ] {
            let folder = fixtures.join(family);
            let base = BaseFolder::open(&folder.join("model"), Some(dtype)).unwrap().quantized(quantization);
            let region = arena.reserve(Part::Base, base.layout().bytes).unwrap();
            let base = base.fill(region, &mut on_progress).unwrap();
            digest.update(base.bytes());
            let lenses = std::fs::read_dir(folder.join("lenses")).unwrap();
            let mut lenses: Vec<_> = lenses.map(|lens| lens.unwrap().path()).collect();
            lenses.sort();
            for lens in lenses {
                // What is not a LoRA is not ours; sums of DoRA are rounded as the instruction set does.
                let Ok(lens) = LoraFolder::open(&lens, base.layout()) else { continue };
                let layout = serde_json::to_string(lens.layout()).unwrap();
                if layout.contains("magnitude") {
                    continue;
                }
                let region = arena.reserve(Part::Lens, lens.layout().bytes).unwrap();
                digest.update(lens.fill(region, &base, &mut on_progress).unwrap().bytes());
                digest.update(layout);
            }
        }
        let found = hex::encode(digest.finalize());
        assert_eq!(
            (LAYOUT_VERSION, found.as_str()),
            (1, "28a8eb7d0fefca7e9a74e7d8dd3239ebef994e0645b7efbc7910f8953ee727f8"),
            "raise LAYOUT_VERSION, and write it and this digest here"
        );
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn no_altered_byte_and_no_lost_end_goes_unnoticed(
            at in 0.0f64..1.0, bit in 0u8..8, cut in proptest::bool::ANY
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a");
            let region = region(2 * CHUNK + 100);
            write(File::create(&path).unwrap(), &identity("a"), "layout".into(), &region, &goes_on()).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            let at = (at * bytes.len() as f64) as usize;
            match cut {
                true => bytes.truncate(at),
                false => bytes[at] ^= 1 << bit,
            }
            std::fs::write(&path, &bytes).unwrap();
            match read(&path, &identity("a")) {
                // Zeros between header and region are nobody's.
                Ok(found) => proptest::prop_assert!(!cut && found == Some(region)),
                Err(Unusable::Altered(_) | Unusable::Io(_)) => {}
            }
        }
    }
}
