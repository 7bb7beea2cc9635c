//! From the job's processes to the copy pipeline, and from there to a complete image.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fs, io};

use super::subject::{Piece, Subject};
use crate::copy::{BlockId, ChunkRef, Ledger};
use crate::device::{Device, GpuId};
use crate::error::EngineError;
use crate::image::{
    Allocation, CHUNK, DriverEntry, FEATURE_PARENT, FEATURE_PRE_DUMP, FEATURE_SHARED, GpuEntry, Image,
    ImageError, ImageWriter, IndexEntry, LibraryEntry, Location, Manifest, ParentEntry, ProcessEntry, Saved,
    SharedEntry, VERSION,
};
use crate::job::{CheckpointJob, CheckpointReport};

/// Brings the ledger to what the processes hold now.
pub fn update(ledger: &mut Ledger, subjects: &[Subject]) {
    let mut live = std::collections::BTreeSet::<BlockId>::new();
    for (process, subject) in subjects.iter().enumerate() {
        for piece in subject.owned() {
            let id = (process as u32, piece.held.id);
            live.insert(id);
            if let Some(region) = &piece.region {
                ledger.add(id, region.gpu, region.address, piece.held.size);
            }
        }
    }
    ledger.retain(|id| live.contains(&id));
}

/// Bytes of chunks on each GPU.
pub fn bytes_by_gpu(ledger: &Ledger, chunks: &[ChunkRef]) -> BTreeMap<GpuId, u64> {
    let mut bytes = BTreeMap::new();
    for chunk in chunks {
        if let Some(block) = ledger.block(chunk.block) {
            *bytes.entry(block.gpu).or_insert(0) += CHUNK as u64;
        }
    }
    bytes
}

/// Takes an earlier image as what is saved already. `own_files`: data files of the image to be written, which are
/// numbered before those of the earlier one.
pub fn assume_parent(
    ledger: &mut Ledger,
    subjects: &[Subject],
    folder: &Path,
    path: &str,
    own_files: usize,
) -> Result<ParentEntry, ImageError> {
    let parent = Image::open(&folder.join(path))?;
    for (process, subject) in subjects.iter().enumerate() {
        let Some(index) = parent.manifest.processes.iter().position(|p| p.pid == subject.kept.own_pid) else {
            continue;
        };
        for a in parent.manifest.allocations.iter().filter(|a| a.process as usize == index) {
            let shifted = |(digest, place): &Saved| match *place {
                Location::Zero => (*digest, Location::Zero),
                Location::File { file, offset, packed } => {
                    (*digest, Location::File { file: file + own_files as u32, offset, packed })
                }
            };
            ledger.assume((process as u32, a.id), parent.saved(a).iter().map(shifted));
        }
    }
    Ok(ParentEntry { path: path.to_string(), digest: parent.digest })
}

/// Removes what the lower runtime's CRIU has left in an image folder.
pub fn remove_criu_images(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".img") && !name.starts_with("phos-") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Removes what there is of the GPU's part of an image.
pub fn remove_begun(image: &Path) {
    for entry in fs::read_dir(image).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().trim_start_matches('.').starts_with("phos") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Size and digest of the `libphos.so` that the container's processes have mapped.
pub(super) fn library_entry(path: &Path) -> io::Result<LibraryEntry> {
    let bytes = fs::read(path)?;
    let digest = phos_digest::digest(&bytes).to_bytes().iter().map(|b| format!("{b:02x}")).collect();
    Ok(LibraryEntry { size: bytes.len() as u64, digest })
}

/// The entries of processes that use memory which another entry stands for.
fn shared_entries(subjects: &[Subject], allocations: &[Allocation]) -> Vec<SharedEntry> {
    let numbers: BTreeMap<BlockId, u32> =
        allocations.iter().zip(0..).map(|(a, n)| ((a.process, a.id), n)).collect();
    let entries = subjects.iter().zip(0..).flat_map(|(subject, process)| {
        let of_piece = |p: &Piece| Some((p.held.id, *numbers.get(&p.owner?)?));
        let mine = subject.pieces.iter().filter_map(of_piece);
        mine.map(move |(id, allocation)| SharedEntry { process, id, allocation }).collect::<Vec<_>>()
    });
    entries.collect()
}

/// Completes the image.
pub fn commit(
    device: &dyn Device,
    (writer, ledger): (ImageWriter, Ledger),
    parent: Option<ParentEntry>,
    job: &CheckpointJob,
    subjects: &[Subject],
    report: &mut CheckpointReport,
) -> Result<(), EngineError> {
    let known = device.gpus()?;
    let mut table: Vec<Option<Saved>> = Vec::new();
    let mut gpus: Vec<GpuEntry> = Vec::new();
    let (mut allocations, mut processes) = (Vec::new(), Vec::new());
    let mut first_chunk = 0;
    for (process, subject) in subjects.iter().enumerate() {
        processes.push(ProcessEntry {
            pid: subject.kept.own_pid,
            command: subject.kept.command.clone(),
            has_library: subject.kept.has_library,
        });
        for piece in subject.owned() {
            let uuid = GpuId(piece.held.device);
            let gpu = match gpus.iter().position(|g| g.uuid == uuid) {
                Some(i) => i,
                None => {
                    let info = known
                        .iter()
                        .find(|g| g.id == uuid)
                        .ok_or(EngineError::HiddenGpu { pid: subject.kept.pid, gpu: uuid })?;
                    gpus.push(GpuEntry { uuid, name: info.name.clone(), total_bytes: info.total });
                    gpus.len() - 1
                }
            };
            allocations.push(Allocation {
                process: process as u32,
                id: piece.held.id,
                gpu: gpu as u32,
                address: piece.held.address,
                size: piece.held.size,
                class: piece.held.class,
                flags: piece.held.flags,
                first_chunk,
            });
            let count = piece.held.size / CHUNK as u64;
            first_chunk += count;
            match ledger.block((process as u32, piece.held.id)) {
                Some(block) => table.extend_from_slice(&block.chunks),
                None => table.extend(std::iter::repeat_n(None, count as usize)),
            }
        }
    }
    let shared = shared_entries(subjects, &allocations);
    let library = match &job.library {
        Some(path) => Some(
            library_entry(path).map_err(|source| EngineError::Io { what: "reading libphos.so", source })?,
        ),
        None => None,
    };
    let driver = device.driver();
    let features = [
        (parent.is_some(), FEATURE_PARENT),
        (job.pre_dump, FEATURE_PRE_DUMP),
        (!shared.is_empty(), FEATURE_SHARED),
    ];
    let manifest = Manifest {
        version: VERSION,
        features: features.iter().filter(|(on, _)| *on).map(|(_, name)| name.to_string()).collect(),
        made_by: format!("phos-runc {}", env!("CARGO_PKG_VERSION")),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        container: job.container.clone(),
        driver: DriverEntry { version: driver.version, release: driver.release },
        lower_runtime: job.lower_version.clone(),
        criu: job.criu_version.clone(),
        chunk_size: CHUNK as u64,
        digest: phos_digest::NAME.to_string(),
        gpus,
        processes,
        allocations,
        shared,
        files: Vec::new(),
        index: IndexEntry { size: 0, digest: String::new() },
        parent,
        library,
        warnings: report.warnings.clone(),
        effective_spec: job.effective_spec.clone(),
    };
    report.gpu_bytes = manifest.gpu_bytes();
    report.written_bytes = writer.written();
    writer.commit(manifest, table)?;
    Ok(())
}
