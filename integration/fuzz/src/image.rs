//! Images.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use arbitrary::{Result, Unstructured};
use phos_engine::device::GpuId;
use phos_engine::image::{
    Allocation, CHUNK, ChunkTable, DriverEntry, FEATURE_PARENT, FEATURE_PRE_DUMP, GpuEntry, INDEX, Image, ImageWriter,
    IndexEntry, Location, MANIFEST, Manifest, ParentEntry, ProcessEntry, Saved, Sink, VERSION,
};

/// A manifest of one allocation of `chunks` chunks.
fn sane(chunks: u64) -> Manifest {
    Manifest {
        version: VERSION,
        features: vec![],
        made_by: "phos-runc".into(),
        created: 0,
        container: "c".into(),
        driver: DriverEntry { version: 13000, release: "580.1".into() },
        lower_runtime: String::new(),
        criu: String::new(),
        chunk_size: CHUNK as u64,
        digest: phos_digest::NAME.into(),
        gpus: vec![GpuEntry { uuid: GpuId([7; 16]), name: "g".into(), total_bytes: 1 << 30 }],
        processes: vec![ProcessEntry { pid: 1, command: "p".into(), has_library: true }],
        allocations: vec![Allocation {
            process: 0,
            id: 0,
            gpu: 0,
            address: 0x1000,
            size: chunks * CHUNK as u64,
            class: 0,
            flags: 0,
            first_chunk: 0,
        }],
        files: vec![],
        index: IndexEntry { size: 0, digest: String::new() },
        parent: None,
        library: None,
        warnings: vec![],
        effective_spec: serde_json::json!({}),
    }
}

/// Writes an image of two chunks, one of them zero.
fn write(folder: &Path, mut manifest: Manifest) {
    let writer = ImageWriter::create(folder, 1).expect("created");
    let mut data = vec![0u8; 2 * CHUNK];
    data[5] = 7;
    let digests: Vec<_> = data.chunks(CHUNK).map(phos_digest::digest).collect();
    let mut places = vec![None; 2];
    writer.put(0, &data, &digests, &mut places).expect("written");
    let table = digests.into_iter().zip(places).map(|(d, p)| p.map(|p| (d, p))).collect();
    manifest.files.clear();
    writer.commit(manifest, table).expect("committed");
}

/// Opens an image; what can be opened can be read without a panic, and every error is one line.
fn open(folder: &Path) -> Option<Image> {
    match Image::open(folder) {
        Ok(image) => {
            for a in &image.manifest.allocations {
                assert_eq!(image.saved(a).len() as u64, a.size / CHUNK as u64);
            }
            if let Err(e) = image.verify() {
                assert!(!e.to_string().contains('\n'), "{e}");
            }
            Some(image)
        }
        Err(e) => {
            let line = e.to_string();
            assert!(!line.contains(|c: char| c.is_control()), "not one plain line: {line:?}");
            None
        }
    }
}

/// `phos.json` beside files that are as they should be.
pub fn manifest(data: &[u8]) {
    thread_local! {
        static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
    }
    FOLDER.with_borrow_mut(|folder| {
        let folder = folder.get_or_insert_with(|| {
            let folder = tempfile::tempdir().expect("a folder");
            write(folder.path(), sane(2));
            folder
        });
        fs::write(folder.path().join(MANIFEST), data).expect("written");
        open(folder.path());
    });
}

/// `phos-chunks.idx`: number of chunks and lengths of the data files come first.
pub fn chunk_table(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok((chunks, files)) = (|| {
        let chunks = u.int_in_range(0..=8u64)?;
        let files: Vec<u64> = (0..u.int_in_range(0..=3)?).map(|_| u.arbitrary()).collect::<Result<_>>()?;
        Ok::<_, arbitrary::Error>((chunks, files))
    })() else {
        return;
    };
    let bytes = u.take_rest();
    let Ok(table) = ChunkTable::decode(bytes, chunks, &files) else { return };
    assert_eq!(table.0.len() as u64, chunks);
    for (_, location) in &table.0 {
        if let Location::File { file, offset } = location {
            assert!(offset + CHUNK as u64 <= files[*file as usize]);
        }
    }
    assert_eq!(table.encode(), bytes, "what is read is what would be written");
}

/// Some text of a hostile image.
fn text(u: &mut Unstructured<'_>) -> Result<String> {
    let known = ["", ".", "..", "../0", "../1", "../2", "../3", "/", "../../etc", "\n", "../0/../1", "\0"];
    Ok(if u.arbitrary()? { (*u.choose(&known)?).into() } else { u.arbitrary::<&str>()?.chars().take(40).collect() })
}

/// Changes one thing of a manifest.
fn distort(m: &mut Manifest, u: &mut Unstructured<'_>) -> Result<()> {
    let a = m.allocations[0];
    match u.int_in_range(0..=15)? {
        0 => m.allocations[0].size = u.arbitrary()?,
        1 => m.allocations[0].first_chunk = u.arbitrary()?,
        2 => m.allocations[0].gpu = u.arbitrary()?,
        3 => m.allocations[0].process = u.arbitrary()?,
        4 => m.allocations.push(Allocation { id: u.arbitrary()?, first_chunk: u.int_in_range(0..=3)?, ..a }),
        5 => m.processes[0].pid = u.arbitrary()?,
        6 => m.processes[0].command = text(u)?,
        7 => m.index.size = u.arbitrary()?,
        8 => m.features.push(text(u)?),
        9 => m.features.push(FEATURE_PRE_DUMP.into()),
        10 => m.warnings.push(text(u)?),
        11 => m.files[0].name = text(u)?,
        12 => m.files[0].size = u.arbitrary()?,
        13 => m.allocations.clear(),
        14 => m.container = text(u)?,
        _ => m.chunk_size = u.arbitrary()?,
    }
    if m.allocations.is_empty() {
        m.allocations.push(Allocation { size: CHUNK as u64, ..a });
    }
    Ok(())
}

/// Up to four images that build on each other, or try to; some of their files are not what they should be.
pub fn chain(data: &[u8]) {
    let top = tempfile::tempdir().expect("a folder");
    let _ = build(top.path(), &mut Unstructured::new(data));
}

fn build(top: &Path, u: &mut Unstructured<'_>) -> Result<()> {
    let count = u.int_in_range(1..=4usize)?;
    let mut digest = String::new();
    for n in 0..count {
        let folder = top.join(n.to_string());
        fs::create_dir(&folder).expect("made");
        write(&folder, sane(2));
        let read = |name: &str| fs::read(folder.join(name)).expect("read");
        let mut m: Manifest = serde_json::from_slice(&read(MANIFEST)).expect("a manifest");
        if n > 0 && u.ratio(3, 4)? {
            let honest = u.ratio(3, 4)?;
            let path = if honest { format!("../{}", n - 1) } else { text(u)? };
            let digest = if u.ratio(7, 8)? { digest.clone() } else { text(u)? };
            m.parent = Some(ParentEntry { path, digest });
            m.features.push(FEATURE_PARENT.into());
            // A table of its own: places in the parents' files, and others.
            let mut table: Vec<Saved> = Vec::new();
            for _ in 0..2 {
                let place = Location::File { file: u.int_in_range(0..=4)?, offset: 4096 * u.int_in_range(0..=2u64)? };
                let zero = u.arbitrary::<bool>()?;
                table.push((phos_digest::ZERO_CHUNK, if zero { Location::Zero } else { place }));
            }
            let bytes = ChunkTable(table).encode();
            fs::write(folder.join(INDEX), &bytes).expect("written");
            m.index.digest = phos_digest::digest(&bytes).to_bytes().iter().map(|b| format!("{b:02x}")).collect();
        }
        for _ in 0..u.int_in_range(0..=2)? {
            distort(&mut m, u)?;
        }
        let text = serde_json::to_vec(&m).expect("JSON");
        digest = phos_digest::digest(&text).to_bytes().iter().map(|b| format!("{b:02x}")).collect();
        fs::write(folder.join(MANIFEST), text).expect("written");
        if u.ratio(1, 8)? {
            let name = *u.choose(&[MANIFEST, INDEX, "phos-gpu-0.img"])?;
            let path = folder.join(name);
            fs::remove_file(&path).expect("removed");
            let target = (*u.choose(&["/dev/zero", "../0/phos.json", "loop", "."])?).to_string();
            std::os::unix::fs::symlink(target, &path).expect("linked");
        }
    }
    for n in 0..count {
        open(&top.join(n.to_string()));
    }
    Ok(())
}
