//! Properties of the engine compared with a plain model: for chains of random links, every way of reading returns the
//! data of the model, and holes are reported only where the model is zero.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use fuse_tests::make::model::Random;
use fuse_tests::make::write::{self, Descriptor, Hosted, NO_PARENT, SeSparse, Stream};
use fuse_tests::make::{Content, Joined, Layer, SECTOR, Shifted};
use proptest::prelude::*;
use proptest::sample::select;
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::config::{DiskConfig, LocalConfig, SourceConfig};
use vmdkfuse::error::ErrorKind;
use vmdkfuse::volume::{self, ReadBuffer, Seek, Volume};

/// Largest extent in sectors; it keeps a disk below 4 MiB.
const EXTENT_MAX: u64 = 2000;

/// Specification of one extent of a link.
#[derive(Debug, Clone)]
struct ExtentSpec {
    sectors: u64,
    /// Sectors of the file or tables beyond the size in the extent line.
    unused: u64,
    form: ExtentForm,
    /// Number of stored grains and of explicit zero grains, both of 256.
    density: (u64, u64),
    /// Seed that selects the grains and their content.
    seed: u64,
}

/// Format of an extent with its options.
#[derive(Debug, Clone)]
enum ExtentForm {
    Flat { offset: u64 },
    Zero,
    Hosted { grain: u64, options: Hosted },
    Stream { grain: u64, options: Stream },
    Cowd { grain: u64 },
    SeSparse { first_index: u64 },
}

/// Specification of one link.
#[derive(Debug, Clone)]
struct LinkSpec {
    extents: Vec<ExtentSpec>,
    /// Embeds the descriptor if the link has one extent, which is hosted sparse or streamOptimized.
    embedded: bool,
}

fn chain() -> impl Strategy<Value = Vec<LinkSpec>> {
    prop::collection::vec(link(), 1..=4)
}

fn link() -> impl Strategy<Value = LinkSpec> {
    let extents = prop_oneof![
        1 => prop::collection::vec(extent(), 1..=1),
        1 => prop::collection::vec(extent(), 2..=4),
    ];
    (extents, any::<bool>()).prop_map(|(extents, embedded)| LinkSpec { extents, embedded })
}

fn extent() -> impl Strategy<Value = ExtentSpec> {
    let sectors = prop_oneof![1..=EXTENT_MAX, select(vec![1, 7, 8, 128, 1024])];
    let unused = prop_oneof![2 => Just(0), 1 => 1..300u64];
    let density = select(vec![(0, 0), (40, 40), (128, 30), (128, 128), (230, 10), (256, 0)]);
    (sectors, unused, form(), density, any::<u64>()).prop_map(|(sectors, unused, form, density, seed)| ExtentSpec {
        sectors,
        unused,
        form,
        density,
        seed,
    })
}

fn form() -> impl Strategy<Value = ExtentForm> {
    let grain = || (3..=11u32).prop_map(|shift| 1u64 << shift);
    let ngte = || select(vec![128, 512, 4096]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let hosted = (grain(), ngte(), flags).prop_map(|(grain, ngte, (lazy, redundant, shuffle, cut_tail))| {
        let options = Hosted {
            ngte,
            lazy,
            redundant,
            shuffle,
            cut_tail,
            ..Hosted::zeroed()
        };
        ExtentForm::Hosted { grain, options }
    });
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let stream = (grain(), ngte(), flags).prop_map(|(grain, ngte, (footer, short_last, progress, lba_header))| {
        let options = Stream {
            ngte,
            footer,
            short_last,
            progress,
            lba_header,
            desc_len: 2,
            ..Stream::default()
        };
        ExtentForm::Stream { grain, options }
    });
    prop_oneof![
        1 => (0..20u64).prop_map(|offset| ExtentForm::Flat { offset }),
        1 => Just(ExtentForm::Zero),
        4 => hosted,
        3 => stream,
        2 => grain().prop_map(|grain| ExtentForm::Cowd { grain }),
        2 => select(vec![0, 1, 4095, 4096]).prop_map(|first_index| ExtentForm::SeSparse { first_index }),
    ]
}

/// Returns the header flags of a hosted file: without redundant tables, the flag for them must be clear.
fn flags_of(options: &Hosted) -> u32 {
    if options.redundant {
        options.flags
    } else {
        options.flags & !write::F_REDUNDANT
    }
}

/// Writes an extent with the embedded descriptor `text`, if any. Returns its content over that of the `parent`.
fn write_extent(
    path: &Path,
    spec: &ExtentSpec,
    parent: Option<Arc<dyn Content>>,
    text: Option<&[u8]>,
) -> Result<Arc<Layer>> {
    let grain = match &spec.form {
        ExtentForm::Hosted { grain, .. } | ExtentForm::Stream { grain, .. } | ExtentForm::Cowd { grain } => *grain,
        ExtentForm::Flat { .. } | ExtentForm::Zero | ExtentForm::SeSparse { .. } => 8,
    };
    // A header with a grain more than the line contradicts it; writers round up to whole grains.
    let capacity = match &spec.form {
        ExtentForm::Flat { .. } | ExtentForm::Zero => spec.sectors + spec.unused,
        _ => spec.sectors + spec.unused % grain,
    };
    let mut random = Random::new(spec.seed);
    let (mut full, mut zero) = (Vec::new(), Vec::new());
    for number in 0..capacity.div_ceil(grain) {
        match random.below(256) {
            n if n < spec.density.0 => full.push(number),
            n if n < spec.density.0 + spec.density.1 => zero.push(number),
            _ => {}
        }
    }
    let layer = Layer::new(spec.seed, "extent", capacity, grain).fill(full);
    let layer = match &spec.form {
        ExtentForm::Hosted { .. } | ExtentForm::SeSparse { .. } => layer.zero(zero),
        _ => layer,
    };
    match &spec.form {
        ExtentForm::Flat { offset } => write::flat(path, &layer, *offset)?,
        ExtentForm::Zero => {}
        ExtentForm::Hosted { options, .. } => {
            write::hosted(
                path,
                &layer,
                text,
                &Hosted {
                    flags: flags_of(options),
                    ..options.clone()
                },
            )
            .map(drop)?;
        }
        ExtentForm::Stream { options, .. } => {
            write::stream(path, &layer, text.unwrap_or_default(), options).map(drop)?;
        }
        ExtentForm::Cowd { .. } => write::cowd(path, &layer).map(drop)?,
        ExtentForm::SeSparse { first_index } => {
            write::sesparse(
                path,
                &layer,
                &SeSparse {
                    first_index: *first_index,
                    ..SeSparse::default()
                },
            )
            .map(drop)?;
        }
    }
    // Sectors beyond the size in the extent line are not part of the disk.
    let layer = layer.resized(spec.sectors);
    Ok(Arc::new(match parent {
        Some(parent) if !matches!(spec.form, ExtentForm::Flat { .. } | ExtentForm::Zero) => layer.over(parent),
        _ => layer,
    }))
}

/// Returns the extent line of the descriptor.
fn line(spec: &ExtentSpec, name: &str) -> String {
    let sectors = spec.sectors;
    match &spec.form {
        ExtentForm::Flat { offset } => format!("RW {sectors} FLAT \"{name}\" {offset}"),
        ExtentForm::Zero => format!("RW {sectors} ZERO"),
        ExtentForm::Hosted { .. } | ExtentForm::Stream { .. } => format!("RW {sectors} SPARSE \"{name}\""),
        ExtentForm::Cowd { .. } => format!("RW {sectors} VMFSSPARSE \"{name}\""),
        ExtentForm::SeSparse { .. } => format!("RW {sectors} SESPARSE \"{name}\""),
    }
}

/// Returns true if the sizes of the links, the oldest first, contradict each other: a link hides data of its parent or
/// of its own file behind its end, where a newer link goes on.
fn contradict(links: &[LinkSpec]) -> bool {
    let size = |link: &LinkSpec| link.extents.iter().map(|extent| extent.sectors).sum::<u64>();
    let is_cut = |link: &LinkSpec| match link.extents.as_slice() {
        [only] => matches!(only.form, ExtentForm::Flat { .. }) && only.unused > 0,
        _ => false,
    };
    (0..links.len()).any(|at| {
        let (older, newer) = (&links[..at], &links[at + 1..]);
        let ends_before = |others: &[LinkSpec]| others.iter().any(|link| size(link) > size(&links[at]));
        let parent = older.last().is_some_and(|parent| size(parent) > size(&links[at]));
        (parent && ends_before(newer)) || (is_cut(&links[at]) && ends_before(&newer[..newer.len().min(1)]))
    })
}

/// Writes the links, the oldest first. Returns the path of the newest link and the content of the disk.
fn write_chain(dir: &Path, links: &[LinkSpec]) -> Result<(PathBuf, Arc<dyn Content>)> {
    let mut newest: Option<(PathBuf, Arc<dyn Content>)> = None;
    for (number, link) in links.iter().enumerate() {
        let path = dir.join(format!("link{number}.vmdk"));
        let file = |extent: usize| format!("link{number}-{extent}.bin");
        let lines: Vec<String> = link
            .extents
            .iter()
            .enumerate()
            .map(|(i, e)| line(e, &file(i)))
            .collect();
        let parent_cid = if number == 0 { NO_PARENT } else { number as u32 };
        let text = Descriptor {
            parent_cid,
            ..Descriptor::new("custom", lines).cid(number as u32 + 1)
        };
        let hint = number.checked_sub(1).map(|parent| format!("link{parent}.vmdk"));
        let text = Descriptor {
            hint,
            encoding: None,
            ..text
        }
        .bytes()?;
        let parent = newest.as_ref().map(|(_, content)| Arc::clone(content));
        let lone = matches!(
            link.extents.as_slice(),
            [ExtentSpec {
                form: ExtentForm::Hosted { .. } | ExtentForm::Stream { .. },
                ..
            }]
        );
        let content: Arc<dyn Content> = if lone && link.embedded {
            write_extent(&path, &link.extents[0], parent, Some(&text))?
        } else {
            let mut joined = Joined::new();
            let mut start = 0;
            for (i, extent) in link.extents.iter().enumerate() {
                let parent = parent
                    .as_ref()
                    .map(|p| Arc::new(Shifted::new(Arc::clone(p), start)) as Arc<dyn Content>);
                joined = match extent.form {
                    ExtentForm::Zero => joined.then_zero(extent.sectors),
                    _ => joined.then(write_extent(&dir.join(file(i)), extent, parent, None)?),
                };
                start += extent.sectors;
            }
            std::fs::write(&path, &text)?;
            Arc::new(joined)
        };
        newest = Some((path, content));
    }
    newest.ok_or_else(|| anyhow::anyhow!("a chain of no links"))
}

fn config(path: &Path, cache_size: Option<u64>) -> DiskConfig {
    let source = SourceConfig::Local(LocalConfig::new(path));
    DiskConfig {
        read_only: true,
        cache_size,
        ..DiskConfig::new("disk", source)
    }
}

/// Returns true for each sector that is not zero, and so must not be reported as a hole.
fn nonzero(whole: &[u8]) -> Vec<bool> {
    whole
        .chunks(SECTOR as usize)
        .map(|sector| sector.iter().any(|b| *b != 0))
        .collect()
}

/// Walks the whole disk by `content_at`. Returns true for each sector reported as data.
fn data_sectors(disk: &dyn BlockRead) -> Result<Vec<bool>> {
    let end = disk.geometry().sectors;
    let mut data = Vec::new();
    while (data.len() as u64) < end {
        let at = data.len() as u64;
        let (content, sectors) = disk.content_at(Lba(at))?;
        anyhow::ensure!((1..=end - at).contains(&sectors), "{sectors} sectors at {at} of {end}");
        data.extend(std::iter::repeat_n(!content.is_zero(), sectors as usize));
    }
    Ok(data)
}

/// Expected content of a disk, and the ranges to read.
struct Expected {
    whole: Vec<u8>,
    /// False if zeroes may be reported as data: file systems allocate flat files in pages.
    exact_holes: bool,
    ranges: Vec<Range<u64>>,
}

/// Compares a disk with its model by reads, `content_at` and `is_zero`.
fn assert_same_sectors(disk: &dyn BlockRead, expected: &Expected) -> Result<(), TestCaseError> {
    let sectors = expected.whole.len() as u64 / SECTOR;
    prop_assert_eq!(disk.geometry().sectors, sectors);
    let mut all = vec![1; expected.whole.len()];
    disk.read_at(Lba(0), &mut all)
        .map_err(|e| TestCaseError::fail(e.to_string()))?;
    prop_assert!(all == expected.whole, "the disk read at once");
    let data = data_sectors(disk).map_err(|e| TestCaseError::fail(e.to_string()))?;
    let full = nonzero(&expected.whole);
    for (sector, (reported, actual)) in data.iter().zip(&full).enumerate() {
        prop_assert!(*reported || !*actual, "sector {} is no hole", sector);
        prop_assert!(
            !expected.exact_holes || reported == actual,
            "sector {} is a hole",
            sector
        );
    }
    for range in &expected.ranges {
        let (first, end) = (range.start / SECTOR, range.end.div_ceil(SECTOR));
        let bytes = (first * SECTOR) as usize..(end * SECTOR) as usize;
        let mut part = vec![1; bytes.len()];
        disk.read_at(Lba(first), &mut part)
            .map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(part == expected.whole[bytes], "sectors {}..{}", first, end);
        let zero = !full[first as usize..end as usize].contains(&true);
        let reported = disk.is_zero(Lba(first), end - first);
        prop_assert!(!reported || zero, "sectors {}..{} are not zero", first, end);
        prop_assert!(
            !expected.exact_holes || reported == zero,
            "sectors {}..{} are zero",
            first,
            end
        );
        let (content, run) = disk
            .content_at(Lba(first))
            .map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(run >= 1 && first + run <= sectors);
        let reported = &data[first as usize..(first + run) as usize];
        prop_assert!(
            reported.iter().all(|d| *d != content.is_zero()),
            "content from sector {} on",
            first
        );
    }
    Ok(())
}

/// Compares a volume with its model by reads and seeks at byte offsets.
fn assert_same_bytes(image: &Volume, expected: &Expected, scratch: &mut ReadBuffer) -> Result<(), TestCaseError> {
    let len = expected.whole.len() as u64;
    prop_assert_eq!(image.len(), len);
    let data = data_sectors(&**image.disk()).map_err(|e| TestCaseError::fail(e.to_string()))?;
    for range in &expected.ranges {
        let len_in_range = (range.end - range.start) as usize;
        // The longer read reaches beyond the end of the disk if the range is near to it.
        for count in [len_in_range, len_in_range + 5000] {
            let got = image
                .read(range.start, count, scratch)
                .map_err(|e| TestCaseError::fail(e.to_string()))?;
            let end = (range.start + count as u64).min(len);
            prop_assert!(
                got == &expected.whole[range.start as usize..end as usize],
                "{:?} of {} bytes",
                range,
                count
            );
        }
        for (target, is_data) in [(Seek::Data, true), (Seek::Hole, false)] {
            let found = image
                .seek(range.start, target)
                .map_err(|e| TestCaseError::fail(e.to_string()))?;
            let first = (range.start / SECTOR) as usize;
            let next = data[first..]
                .iter()
                .position(|d| *d == is_data)
                .map(|n| (first + n) as u64 * SECTOR);
            let end = (target == Seek::Hole).then_some(len);
            prop_assert_eq!(
                found,
                next.map(|at| at.max(range.start)).or(end),
                "{:?} from {}",
                target,
                range.start
            );
        }
    }
    prop_assert_eq!(image.read(len, 1, scratch).map(<[u8]>::len).ok(), Some(0));
    prop_assert_eq!(image.seek(len, Seek::Hole).ok(), Some(None));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_chain_reads_as_its_model(links in chain(), seed: u64) {
        let dir = tempdir().unwrap();
        let (path, model) = write_chain(dir.path(), &links).unwrap();
        let flat = |l: &LinkSpec| l.extents.iter().any(|e| matches!(e.form, ExtentForm::Flat { .. }));
        let expected = Expected {
            whole: model.read(0, model.sectors()),
            exact_holes: !links.iter().any(flat),
            ranges: model.random_ranges(seed, 24, 700_000),
        };
        let source = volume::open_source(&config(&path, None));
        if contradict(&links) {
            prop_assert_eq!(source.unwrap_err().kind(), ErrorKind::Corrupt);
            return Ok(());
        }
        let source = source.unwrap();
        assert_same_sectors(&*source.disk(), &expected)?;
        let report = source.check();
        prop_assert_eq!(report.error_count, 0, "{:?}", report.errors);
        let mut scratch = ReadBuffer::new();
        for cache_size in [None, Some(0)] {
            let image = volume::open(&config(&path, cache_size)).unwrap();
            assert_same_bytes(&image, &expected, &mut scratch)?;
            assert_same_sectors(&**image.disk(), &expected)?;
        }
    }
}

#[test]
fn regression_read_across_a_hole_between_adjacent_grains_of_the_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("disk.vmdk");
    let layer = Layer::new(1, "disk", 3 * 128, 128).fill([0, 2]);
    let text = Descriptor::new("monolithicSparse", ["RW 384 SPARSE \"disk.vmdk\""])
        .bytes()
        .unwrap();
    let options = Hosted {
        shuffle: false,
        ..Hosted::default()
    };
    let layout = write::hosted(&path, &layer, Some(&text), &options).unwrap();
    assert_eq!(
        layout.grains[&0] + 128,
        layout.grains[&2],
        "the grains are not adjacent in the file"
    );
    let image = volume::open(&config(&path, None)).unwrap();
    let mut scratch = ReadBuffer::new();
    let got = image.read(0, 3 * 128 * 512, &mut scratch).unwrap();
    assert!(got == layer.read(0, 3 * 128));
}

#[test]
fn parallel_readers_see_the_same_disk_through_a_small_cache() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("disk.vmdk");
    // 1200 grains of 8 KiB; the smallest cache holds less than half of the disk.
    let layer = Layer::new(1, "stream", 1200 * 16 - 5, 16).fill((0..1200).filter(|n| n % 7 != 3));
    let text = Descriptor::new("streamOptimized", ["RW 19195 SPARSE \"disk.vmdk\""])
        .bytes()
        .unwrap();
    write::stream(
        &path,
        &layer,
        &text,
        &Stream {
            desc_len: 2,
            ..Stream::default()
        },
    )
    .unwrap();
    let image = volume::open(&config(&path, Some(1 << 20))).unwrap();
    let whole = layer.read(0, layer.sectors());
    std::thread::scope(|scope| {
        for reader in 0..4u64 {
            let (image, whole, layer) = (&image, &whole, &layer);
            scope.spawn(move || {
                let mut scratch = ReadBuffer::new();
                let mut assert_same = |range: Range<u64>| {
                    let got = image
                        .read(range.start, (range.end - range.start) as usize, &mut scratch)
                        .unwrap();
                    assert!(
                        got == &whole[range.start as usize..range.end as usize],
                        "reader {reader}: {range:?}"
                    );
                };
                // Two readers read sequentially with different lengths; all four also read random ranges.
                let step = 100_000 + reader * 7777;
                for start in (0..whole.len() as u64).step_by(step as usize).filter(|_| reader < 2) {
                    assert_same(start..(start + step).min(whole.len() as u64));
                }
                layer
                    .random_ranges(reader, 150, 300_000)
                    .into_iter()
                    .for_each(&mut assert_same);
            });
        }
    });
}
