//! Plain model of the content of a disk, which every reader is compared with.
//!
//! A [`Layer`] is one link of a chain: its own whole grains over a parent or over zeroes. A [`Joined`] is a sequence of
//! extents. Both can be read at any range; sectors past the end are zero.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Bytes read for one update of the hash.
const CHUNK: u64 = 1 << 20;

/// Content of a disk.
pub trait Content: fmt::Debug + Send + Sync {
    /// Returns the size of the disk in sectors.
    fn sectors(&self) -> u64;

    /// Fills `out`, whole sectors, with the content from `sector` on; sectors past the end are zero.
    fn copy_to(&self, sector: u64, out: &mut [u8]);

    /// Returns sectors at which the content may change between data, zeroes and parent, unordered. Readers are most
    /// likely to fail there.
    fn borders(&self) -> Vec<u64>;

    /// Returns `count` sectors from `sector` on.
    fn read(&self, sector: u64, count: u64) -> Vec<u8> {
        let mut out = vec![0; (count * SECTOR) as usize];
        self.copy_to(sector, &mut out);
        out
    }

    /// Returns the bytes of a range that need not be aligned to sectors.
    fn read_bytes(&self, range: &Range<u64>) -> Vec<u8> {
        let first = range.start / SECTOR;
        let whole = self.read(first, range.end.div_ceil(SECTOR).saturating_sub(first));
        let skip = (range.start - first * SECTOR) as usize;
        whole[skip..skip + (range.end - range.start) as usize].to_vec()
    }

    /// Returns the SHA-256 of the whole disk in lower-case hex digits. Reads everything: not for disks of several TiB.
    fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; CHUNK as usize];
        let mut at = 0;
        while at < self.sectors() {
            let n = (CHUNK / SECTOR).min(self.sectors() - at);
            let part = &mut buffer[..(n * SECTOR) as usize];
            self.copy_to(at, part);
            hash.update(&*part);
            at += n;
        }
        hash.finalize().iter().fold(String::new(), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// Returns `count` byte ranges of up to `longest` bytes inside the disk, the same ones for the same `seed`.
    ///
    /// Half of them lie around a border of the content, the others anywhere; most are unaligned.
    fn random_ranges(&self, seed: u64, count: usize, longest: u64) -> Vec<Range<u64>> {
        let size = self.sectors() * SECTOR;
        let borders = self.borders();
        let mut random = Random::new(seed);
        (0..count)
            .map(|i| {
                let length = 1 + random.below(longest.min(size).max(1));
                let start = match borders.len() as u64 {
                    n if n > 0 && i % 2 == 0 => {
                        let border = borders[random.below(n) as usize] * SECTOR;
                        border.saturating_sub(random.below(length + 1))
                    }
                    _ => random.below(size.max(1)),
                };
                let start = start.min(size.saturating_sub(length));
                start..(start + length).min(size)
            })
            .collect()
    }
}

/// One link of a chain: its own grains over its parent.
#[derive(Clone)]
pub struct Layer {
    key: u64,
    label: String,
    capacity: u64,
    grain: u64,
    parent: Option<Arc<dyn Content>>,
    grains: BTreeMap<u64, Option<Vec<u8>>>,
}

impl Layer {
    /// Creates an empty layer whose noise derives from `seed` and `label`. Capacity and grain are in sectors.
    pub fn new(seed: u64, label: &str, capacity: u64, grain: u64) -> Self {
        let key = label.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
        Self {
            key,
            label: label.to_owned(),
            capacity,
            grain,
            parent: None,
            grains: BTreeMap::new(),
        }
    }

    /// Puts the layer over a parent.
    #[must_use]
    pub fn over(mut self, parent: Arc<dyn Content>) -> Self {
        self.parent = Some(parent);
        self
    }

    /// Splits a raw image of whole sectors into grains, without those that are zero.
    pub fn from_raw(label: &str, grain: u64, raw: &[u8]) -> Self {
        let mut layer = Self::new(0, label, raw.len() as u64 / SECTOR, grain);
        let bytes = (grain * SECTOR) as usize;
        for (number, data) in raw
            .chunks(bytes)
            .enumerate()
            .filter(|(_, data)| data.iter().any(|b| *b != 0))
        {
            let mut whole = data.to_vec();
            whole.resize(bytes, 0);
            layer.grains.insert(number as u64, Some(whole));
        }
        layer
    }

    /// Adds whole grains of noise.
    #[must_use]
    pub fn fill(mut self, numbers: impl IntoIterator<Item = u64>) -> Self {
        for number in numbers {
            let data = self.noise(number * self.grain, self.grain);
            self.grains.insert(number, Some(data));
        }
        self
    }

    /// Adds explicitly zero grains, which hide the parent.
    #[must_use]
    pub fn zero(mut self, numbers: impl IntoIterator<Item = u64>) -> Self {
        self.grains.extend(numbers.into_iter().map(|number| (number, None)));
        self
    }

    /// Writes noise as a guest does: a grain written in part takes the rest from its previous content.
    #[must_use]
    pub fn write(mut self, sector: u64, count: u64) -> Self {
        let (mut at, end) = (sector, sector + count);
        while at < end {
            let number = at / self.grain;
            let first = number * self.grain;
            let n = (end - at).min(first + self.grain - at);
            let mut data = self.read(first, self.grain);
            let inside = ((at - first) * SECTOR) as usize;
            data[inside..inside + (n * SECTOR) as usize].copy_from_slice(&self.noise(at, n));
            self.grains.insert(number, Some(data));
            at += n;
        }
        self
    }

    /// Adds one grain with the given bytes, which must be a whole grain.
    #[must_use]
    pub fn with_grain(mut self, number: u64, data: Vec<u8>) -> Self {
        self.grains.insert(number, Some(data));
        self
    }

    /// Changes the capacity and keeps the grains.
    #[must_use]
    pub fn resized(mut self, capacity: u64) -> Self {
        self.capacity = capacity;
        self
    }

    /// Returns the grain size in sectors.
    pub fn grain(&self) -> u64 {
        self.grain
    }

    /// Returns the layer's own grains by number; `None` is an explicitly zero grain.
    pub fn grains(&self) -> &BTreeMap<u64, Option<Vec<u8>>> {
        &self.grains
    }

    /// Returns a number derived from the seed and the label, to seed further random choices.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Returns noise for `count` sectors; about half of each sector compresses well.
    fn noise(&self, sector: u64, count: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity((count * SECTOR) as usize);
        for sector in sector..sector + count {
            let mut random = Random::new(self.key ^ mix(sector));
            for _ in 0..32 {
                out.extend_from_slice(&random.next().to_le_bytes());
            }
            out.extend_from_slice(format!("{sector:<16}").repeat(16).as_bytes());
        }
        out
    }

    /// Returns the content at `sector`, and the number of sectors of the same kind from there on.
    fn piece(&self, sector: u64) -> (Piece<'_>, u64) {
        if sector >= self.capacity {
            return (Piece::Zero, u64::MAX);
        }
        let (number, inside) = (sector / self.grain, sector % self.grain);
        let rest = self.capacity - sector;
        match self.grains.range(number..).next() {
            Some((n, data)) if *n == number => {
                let piece = data
                    .as_ref()
                    .map_or(Piece::Zero, |data| Piece::Data(&data[(inside * SECTOR) as usize..]));
                (piece, rest.min(self.grain - inside))
            }
            Some((n, _)) => (Piece::Parent, rest.min(n * self.grain - sector)),
            None => (Piece::Parent, rest),
        }
    }
}

impl Content for Layer {
    fn sectors(&self) -> u64 {
        self.capacity
    }

    fn copy_to(&self, mut sector: u64, mut out: &mut [u8]) {
        while !out.is_empty() {
            let (piece, sectors) = self.piece(sector);
            let n = sectors.min(out.len() as u64 / SECTOR);
            let (part, rest) = out.split_at_mut((n * SECTOR) as usize);
            match (piece, &self.parent) {
                (Piece::Data(data), _) => part.copy_from_slice(&data[..part.len()]),
                (Piece::Parent, Some(parent)) => parent.copy_to(sector, part),
                (Piece::Parent, None) | (Piece::Zero, _) => part.fill(0),
            }
            (sector, out) = (sector + n, rest);
        }
    }

    fn borders(&self) -> Vec<u64> {
        let mut all: Vec<u64> = self
            .grains
            .keys()
            .flat_map(|n| [n * self.grain, (n + 1) * self.grain])
            .collect();
        all.extend(self.parent.iter().flat_map(|parent| parent.borders()));
        all.push(self.capacity);
        all.retain(|sector| *sector <= self.capacity);
        all
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layer")
            .field("label", &self.label)
            .field("capacity", &self.capacity)
            .field("grain", &self.grain)
            .field("grains", &self.grains.len())
            .field("parent", &self.parent)
            .finish()
    }
}

/// A sequence of extents.
#[derive(Debug, Default)]
pub struct Joined {
    parts: Vec<(Option<Arc<dyn Content>>, u64)>,
}

impl Joined {
    /// Creates a disk without extents.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an extent as long as its content.
    #[must_use]
    pub fn then(mut self, part: Arc<dyn Content>) -> Self {
        let sectors = part.sectors();
        self.parts.push((Some(part), sectors));
        self
    }

    /// Appends a zero extent.
    #[must_use]
    pub fn then_zero(mut self, sectors: u64) -> Self {
        self.parts.push((None, sectors));
        self
    }
}

impl Content for Joined {
    fn sectors(&self) -> u64 {
        self.parts.iter().map(|(_, sectors)| sectors).sum()
    }

    fn copy_to(&self, sector: u64, out: &mut [u8]) {
        out.fill(0);
        let end = sector + out.len() as u64 / SECTOR;
        let mut base = 0;
        for (part, sectors) in &self.parts {
            let (low, high) = (sector.max(base), end.min(base + sectors));
            if let Some(part) = part.as_ref().filter(|_| low < high) {
                let bytes = ((low - sector) * SECTOR) as usize..((high - sector) * SECTOR) as usize;
                part.copy_to(low - base, &mut out[bytes]);
            }
            base += sectors;
        }
    }

    fn borders(&self) -> Vec<u64> {
        let mut base = 0;
        let mut all = Vec::new();
        for (part, sectors) in &self.parts {
            all.push(base);
            all.extend(part.iter().flat_map(|part| part.borders()).map(|sector| base + sector));
            base += sectors;
        }
        all
    }
}

/// A disk without its first sectors: the part of a parent below an extent in the middle of a child.
#[derive(Debug)]
pub struct Shifted {
    of: Arc<dyn Content>,
    by: u64,
}

impl Shifted {
    /// Creates a view of the disk `of` from sector `by` on.
    pub fn new(of: Arc<dyn Content>, by: u64) -> Self {
        Self { of, by }
    }
}

impl Content for Shifted {
    fn sectors(&self) -> u64 {
        self.of.sectors().saturating_sub(self.by)
    }

    fn copy_to(&self, sector: u64, out: &mut [u8]) {
        self.of.copy_to(self.by + sector, out);
    }

    fn borders(&self) -> Vec<u64> {
        self.of
            .borders()
            .into_iter()
            .filter_map(|sector| sector.checked_sub(self.by))
            .collect()
    }
}

/// Pseudo-random sequence that derives from its seed (splitmix64: noise enough for tests, and fast in debug builds).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Creates the sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    #[allow(
        clippy::should_implement_trait,
        reason = "the sequence never ends, so an Option would be of no use"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// Returns a number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Shuffles `items` (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

enum Piece<'a> {
    Data(&'a [u8]),
    Zero,
    Parent,
}

/// The increment of splitmix64: 2^64 divided by the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of splitmix64.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_hides_its_parent_where_it_has_grains() {
        let base: Arc<dyn Content> = Arc::new(Layer::new(1, "base", 64, 8).fill([0, 1, 2]));
        let top = Layer::new(1, "top", 80, 16)
            .over(Arc::clone(&base))
            .write(3, 2)
            .zero([1]);
        assert_eq!(top.read(0, 3), base.read(0, 3));
        assert_ne!(top.read(3, 1), base.read(3, 1));
        assert_eq!(top.read(5, 11), base.read(5, 11));
        assert_eq!(top.read(16, 64), vec![0; 64 * 512]);
        assert_eq!(top.read_bytes(&(1000..2100)), top.read(0, 5)[1000..2100]);
    }

    #[test]
    fn a_layer_reads_as_zeroes_past_its_end() {
        let layer = Layer::new(1, "x", 10, 8).fill([0, 1]);
        assert_ne!(layer.read(9, 1), vec![0; 512]);
        assert_eq!(layer.read(10, 20), vec![0; 20 * 512]);
    }

    #[test]
    fn noise_derives_from_seed_label_and_sector() {
        let noise = |seed, label: &str| Layer::new(seed, label, 16, 8).fill([0, 1]).read(0, 16);
        assert_eq!(noise(1, "a"), noise(1, "a"));
        assert_ne!(noise(1, "a"), noise(2, "a"));
        assert_ne!(noise(1, "a"), noise(1, "b"));
        assert_ne!(noise(1, "a")[..512], noise(1, "a")[512..1024]);
    }

    #[test]
    fn joined_extents_follow_each_other() {
        let (a, b) = (
            Arc::new(Layer::new(1, "a", 5, 8).fill([0])),
            Arc::new(Layer::new(1, "b", 7, 8).fill([0])),
        );
        let disk = Joined::new().then(a.clone()).then_zero(3).then(b.clone());
        assert_eq!(disk.sectors(), 15);
        assert_eq!(disk.read(0, 5), a.read(0, 5));
        assert_eq!(disk.read(5, 3), vec![0; 3 * 512]);
        assert_eq!(disk.read(8, 7), b.read(0, 7));
    }

    #[test]
    fn a_shifted_disk_lacks_its_start() {
        let base = Arc::new(Layer::new(1, "base", 64, 8).fill([0, 1, 7]));
        let rest = Shifted::new(base.clone(), 10);
        assert_eq!(rest.sectors(), 54);
        assert!(rest.read(0, 60) == base.read(10, 60));
    }

    #[test]
    fn sha256_is_that_of_the_bytes() {
        // printf of 512 zero bytes into sha256sum.
        let zero = "076a27c79e5ace2a3d47f9dd2e83e4ff6ea8872b3c2218f66c92b89b55f36560";
        assert_eq!(Layer::new(1, "x", 1, 8).sha256(), zero);
    }

    #[test]
    fn random_ranges_stay_inside() {
        let layer = Layer::new(1, "x", 133_143_986_176, 128).fill([0, 1_000_000]);
        let ranges = layer.random_ranges(3, 200, 1 << 20);
        assert_eq!(ranges, layer.random_ranges(3, 200, 1 << 20));
        assert!(
            ranges
                .iter()
                .all(|r| r.start < r.end && r.end <= layer.sectors() * SECTOR)
        );
    }

    #[test]
    fn raw_bytes_become_grains() {
        let mut raw = vec![0; 9 * 512];
        raw[8 * 512] = 7;
        let layer = Layer::from_raw("x", 4, &raw);
        assert_eq!(layer.grains().keys().copied().collect::<Vec<_>>(), [2]);
        assert_eq!(layer.read(0, 9), raw);
    }
}
