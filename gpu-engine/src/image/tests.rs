use std::fs;
use std::path::Path;

use super::manifest::MOST_CHUNKS;
use super::*;
use crate::device::GpuId;

pub(super) fn manifest(sizes: &[usize]) -> Manifest {
    let mut first_chunk = 0;
    let allocations = sizes
        .iter()
        .enumerate()
        .map(|(i, chunks)| {
            let a = Allocation {
                process: 0,
                id: i as u64,
                gpu: 0,
                address: 0x1000,
                size: (chunks * CHUNK) as u64,
                class: 0,
                flags: 0,
                first_chunk,
            };
            first_chunk += *chunks as u64;
            a
        })
        .collect();
    Manifest {
        version: VERSION,
        features: vec![],
        made_by: "test".into(),
        created: 0,
        container: "c".into(),
        driver: DriverEntry { version: 13000, release: String::new() },
        lower_runtime: String::new(),
        criu: String::new(),
        chunk_size: CHUNK as u64,
        digest: phos_digest::NAME.into(),
        gpus: vec![GpuEntry { uuid: GpuId([7; 16]), name: "g".into(), total_bytes: 1 }],
        processes: vec![ProcessEntry { pid: 1, command: "p".into(), has_library: true }],
        allocations,
        files: vec![],
        index: IndexEntry { size: 0, digest: String::new() },
        parent: None,
        library: None,
        warnings: vec![],
        effective_spec: serde_json::json!({}),
    }
}

/// Chunk `n` of the test image; every third is zero.
fn chunk(n: u64) -> Vec<u8> {
    if n % 3 == 2 { vec![0; CHUNK] } else { (0..CHUNK).map(|i| (i as u64 * (n + 1) + n) as u8).collect() }
}

/// Puts chunks from `first` on through `lane` and records them in `table`.
fn put(writer: &ImageWriter, lane: usize, first: usize, count: usize, table: &mut [Option<Saved>]) {
    let data: Vec<u8> = (first..first + count).flat_map(|n| chunk(n as u64)).collect();
    let digests: Vec<_> = data.chunks(CHUNK).map(phos_digest::digest).collect();
    let mut places: Vec<_> = table[first..first + count].iter().map(|s| s.map(|(_, place)| place)).collect();
    writer.put(lane, &data, &digests, &mut places).unwrap();
    for (n, (digest, place)) in digests.into_iter().zip(places).enumerate() {
        table[first + n] = place.map(|p| (digest, p));
    }
}

pub(super) fn write(folder: &Path) {
    let writer = ImageWriter::create(folder, 2).unwrap();
    let mut table = vec![None; 7];
    put(&writer, 0, 0, 5, &mut table);
    put(&writer, 1, 5, 1, &mut table);
    put(&writer, 1, 6, 1, &mut table);
    assert_eq!(writer.written(), 5 * CHUNK as u64);
    // Written again by another thread: nothing moves, nothing grows.
    let before = table.clone();
    put(&writer, 1, 0, 5, &mut table);
    assert_eq!((before, 5 * CHUNK as u64), (table.clone(), writer.written()));
    writer.commit(manifest(&[4, 3]), table).unwrap();
}

fn read_all(folder: &Path) -> Result<Vec<u8>, ImageError> {
    let image = Image::open(folder)?;
    let mut out = Vec::new();
    let mut buffer = vec![0xff; 4 * CHUNK];
    for a in &image.manifest.allocations {
        let extents = image.extents(a, buffer.len());
        for e in &extents {
            assert_eq!(e.at as usize, out.len() - a.first_chunk as usize * CHUNK);
            image.read(e, &mut buffer)?;
            out.extend_from_slice(&buffer[..e.count as usize * CHUNK]);
        }
    }
    Ok(out)
}

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let expected: Vec<u8> = (0..7).flat_map(chunk).collect();
    assert!(read_all(folder.path()).unwrap() == expected);
    assert_eq!(Image::open(folder.path()).unwrap().verify().unwrap(), 5 * CHUNK as u64);
}

#[test]
fn an_open_image_survives_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let image = Image::open(folder.path()).unwrap();
    drop(folder);
    image.verify().unwrap();
}

#[test]
fn every_damaged_byte_is_found() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    for name in [data_file(0), data_file(1), INDEX.to_string()] {
        let path = folder.path().join(&name);
        let good = fs::read(&path).unwrap();
        let step = if name == INDEX { 1 } else { 4099 };
        for at in (0..good.len()).step_by(step) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            assert!(read_all(folder.path()).is_err(), "{name} byte {at}");
        }
        for len in [0, 1, good.len() - 1] {
            fs::write(&path, &good[..len]).unwrap();
            assert!(read_all(folder.path()).is_err(), "{name} cut to {len}");
        }
        fs::write(&path, &good).unwrap();
    }
    read_all(folder.path()).unwrap();
}

#[test]
fn damaged_manifests_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let path = folder.path().join(MANIFEST);
    let good = fs::read_to_string(&path).unwrap();
    let cases = [
        ("\"version\": 1", "\"version\": 2", "format version 2"),
        ("\"features\": []", "\"features\": [\"chain\"]", "feature 'chain'"),
        ("\"chunk_size\": 262144", "\"chunk_size\": 1", "chunk size"),
        ("phos-gpu-0.img", "../phos-gpu-0.img", "is called"),
        ("\"size\": 1048576", "\"size\": 18446744073709551615", "bytes"),
        ("\"size\": 1048576", "\"size\": 4398046511104", "begins at chunk"),
        ("\"gpu\": 0", "\"gpu\": 9", "not listed"),
        ("\"first_chunk\": 4", "\"first_chunk\": 3", "begins at chunk"),
        ("\"id\": 1", "\"id\": 0", "twice"),
        ("\"pid\": 1", "\"pid\": -1", "cannot exist"),
    ];
    for (from, to, expected) in cases {
        assert!(good.contains(from), "{from}");
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let error = Image::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{to}: {error}");
    }
    for len in [0, 10, good.len() / 2, good.len() - 2] {
        fs::write(&path, &good[..len]).unwrap();
        let error = Image::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("manifest is damaged"), "{error}");
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(Image::open(folder.path()), Err(ImageError::Missing(_))));
}

#[test]
fn without_commit_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let writer = ImageWriter::create(folder.path(), 2).unwrap();
    put(&writer, 0, 0, 1, &mut [None]);
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let writer = ImageWriter::create(folder.path(), 1).unwrap();
    let mut table = vec![None; 2];
    put(&writer, 0, 0, 1, &mut table);
    let error = writer.commit(manifest(&[2]), table).unwrap_err();
    assert!(error.to_string().contains("never written"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// An image in `folder` whose first three chunks are those of the image in `../base`, and whose fourth is new.
fn write_child(folder: &Path, base: &Path) {
    let parent = Image::open(base).unwrap();
    let writer = ImageWriter::create(folder, 1).unwrap();
    let own = |(digest, place): &Saved| match *place {
        Location::File { file, offset } => Some((*digest, Location::File { file: file + 1, offset })),
        Location::Zero => Some((*digest, Location::Zero)),
    };
    let mut table: Vec<_> = parent.saved(&parent.manifest.allocations[0]).iter().map(own).collect();
    put(&writer, 0, 3, 1, &mut table);
    assert_eq!(writer.written(), CHUNK as u64, "a place in the parent is never written to");
    let mut manifest = manifest(&[4]);
    manifest.features.push(FEATURE_PARENT.into());
    manifest.parent = Some(ParentEntry { path: "../base".into(), digest: parent.digest });
    writer.commit(manifest, table).unwrap();
}

#[test]
fn an_image_reads_through_to_the_one_it_builds_on() {
    let top = tempfile::tempdir().unwrap();
    let [base, child] = ["base", "child"].map(|n| top.path().join(n));
    for folder in [&base, &child] {
        fs::create_dir(folder).unwrap();
    }
    write(&base);
    write_child(&child, &base);
    assert_eq!(read_all(&child).unwrap(), (0..4).flat_map(chunk).collect::<Vec<_>>());
    // Another image in its place, or none, is noticed.
    let manifest = base.join(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"created\": ", "\"created\": 1")).unwrap();
    let error = Image::open(&child).unwrap_err().to_string();
    assert!(error.contains("is not the one it was"), "{error}");
    fs::remove_file(&manifest).unwrap();
    let error = Image::open(&child).unwrap_err().to_string();
    assert!(error.contains("is not there"), "{error}");
}

#[test]
fn a_manifest_cannot_make_a_reader_allocate_what_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let path = folder.path().join(MANIFEST);
    let mut manifest: Manifest = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    manifest.allocations.truncate(1);
    // A chunk table that would be 2 TiB long, and is so, as a file with nothing in it.
    manifest.allocations[0].size = (1 << 36) * CHUNK as u64;
    manifest.index.size = ChunkTable::encoded_len(1 << 36);
    fs::write(&path, serde_json::to_string(&manifest).unwrap()).unwrap();
    fs::File::create(folder.path().join(INDEX)).unwrap().set_len(manifest.index.size).unwrap();
    let error = Image::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("bytes") || error.contains("more chunks"), "{error}");
    manifest.allocations[0].size = (MOST_CHUNKS + 1) * CHUNK as u64;
    manifest.index.size = ChunkTable::encoded_len(MOST_CHUNKS + 1);
    fs::write(&path, serde_json::to_string(&manifest).unwrap()).unwrap();
    fs::File::create(folder.path().join(INDEX)).unwrap().set_len(manifest.index.size).unwrap();
    let error = Image::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("more chunks than"), "{error}");
}

proptest::proptest! {
    /// Whatever is done to the two files that a reader interprets, it says yes or no.
    #[test]
    fn no_change_makes_a_reader_panic(
        which in 0usize..2,
        changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<u8>()), 1..6),
        cut: Option<proptest::sample::Index>,
    ) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path());
        let path = folder.path().join([MANIFEST, INDEX][which]);
        let mut bytes = fs::read(&path).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            // Digits stay digits: numbers are what a reader trusts too easily.
            bytes[at] = if bytes[at].is_ascii_digit() { b'0' + byte % 10 } else { byte };
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(image) = Image::open(folder.path()) {
            let _ = image.verify();
        }
    }
}
