//! What CRIU and a page server say to each other, and how a page map is written down.
//!
//! A message is a `struct page_server_iov` of CRIU's `page-xfer.c`, followed by the pages themselves where it announces some.
//! It comes in two layouts: up to CRIU 4.1 the number of pages has 32 bits, later 64. The first message is never followed by
//! anything before it is answered, and carries an id that is not zero: that tells which layout it is.
//! The page map is CRIU's `pagemap.proto` in an image file with its usual head (`magic.h`).

use thiserror::Error;

/// Bytes of the shorter layout.
pub const SHORT: usize = 24;
/// Bytes of the longer layout.
pub const LONG: usize = 32;

const HOLE: u32 = 2;
const OPEN: u32 = 4;
const HAS_PARENT: u32 = 5;
const ADD: u32 = 6;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;

const KIND_BITS: u32 = 8;
const KIND_PROCESS: u64 = 1;
const KIND_SHARED: u64 = 2;

/// Flag of pages whose content is in the image (`PE_PRESENT`).
const PRESENT: u32 = 4;

const IMAGE_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;

/// The other side does not keep to the protocol.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ProtocolError {
    /// A command that a dump does not use.
    #[error("command {0:#x} of CRIU is not known")]
    Command(u32),
    /// An id of another kind.
    #[error("CRIU names memory of an unknown kind ({0:#x})")]
    Kind(u64),
    /// More pages than an address space has.
    #[error("CRIU announces {0} pages at once")]
    Pages(u64),
    /// Pages of memory that has not been named before.
    #[error("CRIU sends pages of {0:#x} without having opened it")]
    NotOpen(u64),
}

/// Where the fields of a message lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// 32 bits for the number of pages.
    Short,
    /// 64 bits.
    Long,
}

impl Layout {
    /// The layout of the first message, of which so much is there.
    pub fn of(first: &[u8; SHORT]) -> Layout {
        // Where the short layout has its id the long one has an address, and the first message has none.
        let opens =
            number(first, 0, 4) as u32 & 0xffff == OPEN || number(first, 0, 4) as u32 & 0xffff == HAS_PARENT;
        if opens && number(first, 16, 8) == 0 { Layout::Long } else { Layout::Short }
    }

    /// Bytes of a message.
    pub fn len(self) -> usize {
        match self {
            Layout::Short => SHORT,
            Layout::Long => LONG,
        }
    }
}

fn number(from: &[u8], at: usize, bytes: usize) -> u64 {
    from[at..at + bytes].iter().rev().fold(0, |sum, b| sum << 8 | u64::from(*b))
}

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A process, by its id in its own PID namespace.
    Process(u64),
    /// A piece of shared memory, by CRIU's number for it.
    Shared(u64),
}

impl Owner {
    fn of(id: u64) -> Result<Owner, ProtocolError> {
        match id & ((1 << KIND_BITS) - 1) {
            KIND_PROCESS => Ok(Owner::Process(id >> KIND_BITS)),
            KIND_SHARED => Ok(Owner::Shared(id >> KIND_BITS)),
            _ => Err(ProtocolError::Kind(id)),
        }
    }

    /// Name of its page map in an image.
    pub fn pagemap(self) -> String {
        match self {
            Owner::Process(id) => format!("pagemap-{id}.img"),
            Owner::Shared(id) => format!("pagemap-shmem-{id}.img"),
        }
    }
}

/// A stretch of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Address of the first one.
    pub address: u64,
    /// How many.
    pub pages: u32,
    /// CRIU's flags (`PE_*`).
    pub flags: u32,
}

impl Run {
    /// Whether the pages themselves follow.
    pub fn has_content(self) -> bool {
        self.flags & PRESENT != 0
    }
}

/// What CRIU asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// The memory of `Owner` follows. Is answered with a byte: whether an earlier image has some of it.
    Open(Owner),
    /// Whether an earlier image has some of it. Is answered with 32 bits.
    HasParent,
    /// Pages of the memory that was opened last.
    Add(Run),
    /// All is sent. Is answered with 32 bits, 0 if all is saved: only then does CRIU let go of the processes.
    Close,
}

/// Reads messages. Remembers what is open.
#[derive(Debug, Default)]
pub struct Reader {
    open: Option<u64>,
}

impl Reader {
    /// Understands one message of `layout`.
    pub fn read(&mut self, layout: Layout, message: &[u8; LONG]) -> Result<Request, ProtocolError> {
        let command = number(message, 0, 4) as u32;
        let (pages, address, id) = match layout {
            Layout::Short => (number(message, 4, 4), number(message, 8, 8), number(message, 16, 8)),
            Layout::Long => (number(message, 8, 8), number(message, 16, 8), number(message, 24, 8)),
        };
        let flags = command >> 16;
        match command & 0xffff {
            OPEN => {
                let owner = Owner::of(id)?;
                self.open = Some(id);
                Ok(Request::Open(owner))
            }
            HAS_PARENT => Ok(Request::HasParent),
            ADD | HOLE if self.open != Some(id) => Err(ProtocolError::NotOpen(id)),
            ADD => {
                let pages = u32::try_from(pages).map_err(|_| ProtocolError::Pages(pages))?;
                Ok(Request::Add(Run { address, pages, flags }))
            }
            CLOSE | FORCE_CLOSE => Ok(Request::Close),
            // Holes are what an earlier image has, and CRIU is told that there is none.
            other => Err(ProtocolError::Command(other)),
        }
    }
}

fn varint(into: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

/// A page map as it stands in an image file.
#[derive(Debug)]
pub struct PageMap(Vec<u8>);

impl PageMap {
    /// The map of pages that lie in `pages-NUMBER.img`.
    pub fn new(number: u32) -> Self {
        let mut map = PageMap([IMAGE_MAGIC.to_le_bytes(), PAGEMAP_MAGIC.to_le_bytes()].concat());
        map.entry(&[(1, u64::from(number))]);
        map
    }

    /// Adds a stretch of pages.
    pub fn add(&mut self, run: Run) {
        self.entry(&[(1, run.address), (2, u64::from(run.pages)), (4, u64::from(run.flags))]);
    }

    /// A message of numbers: `(field, value)`.
    fn entry(&mut self, fields: &[(u8, u64)]) {
        let mut body = Vec::with_capacity(16);
        for (field, value) in fields {
            body.push(field << 3);
            varint(&mut body, *value);
        }
        self.0.extend((body.len() as u32).to_le_bytes());
        self.0.extend(body);
    }

    /// The file's content.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(layout: Layout, command: u32, pages: u64, address: u64, id: u64) -> [u8; LONG] {
        let mut bytes = command.to_le_bytes().to_vec();
        match layout {
            Layout::Short => bytes.extend((pages as u32).to_le_bytes()),
            Layout::Long => bytes.extend([[0xaa; 4].as_slice(), &pages.to_le_bytes()].concat()),
        }
        bytes.extend(address.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.resize(LONG, 0);
        bytes.try_into().unwrap()
    }

    #[test]
    fn the_first_message_tells_its_layout() {
        for layout in [Layout::Short, Layout::Long] {
            for command in [OPEN, HAS_PARENT] {
                let first = message(layout, command, 0, 0, 7 << 8 | 1);
                assert_eq!(Layout::of(first[..SHORT].try_into().unwrap()), layout);
                assert_eq!(layout.len(), if layout == Layout::Short { 24 } else { 32 });
            }
            // Nothing to save: there is no more to be read.
            let only = message(layout, FORCE_CLOSE, 0, 0, 0);
            assert_eq!(Layout::of(only[..SHORT].try_into().unwrap()), Layout::Short);
            assert_eq!(Reader::default().read(Layout::Short, &only), Ok(Request::Close));
        }
    }

    #[test]
    fn requests_are_understood_in_both_layouts() {
        for layout in [Layout::Short, Layout::Long] {
            let mut reader = Reader::default();
            let mut read = |command, pages, address, id| {
                reader.read(layout, &message(layout, command, pages, address, id))
            };
            let process = 7 << 8 | 1;
            assert_eq!(read(ADD | 4 << 16, 1, 0, process), Err(ProtocolError::NotOpen(process)));
            assert_eq!(read(OPEN, 0, 0, process), Ok(Request::Open(Owner::Process(7))));
            let run = Run { address: 0x7f00_0000_1000, pages: 513, flags: 4 };
            assert_eq!(read(ADD | 4 << 16, 513, 0x7f00_0000_1000, process), Ok(Request::Add(run)));
            assert!(run.has_content());
            assert_eq!(read(OPEN, 0, 0, 9 << 8 | 2), Ok(Request::Open(Owner::Shared(9))));
            assert_eq!(read(ADD | 4 << 16, 1, 0, process), Err(ProtocolError::NotOpen(process)));
            assert_eq!(read(OPEN, 0, 0, 9 << 8 | 3), Err(ProtocolError::Kind(9 << 8 | 3)));
            assert_eq!(read(99, 0, 0, 0), Err(ProtocolError::Command(99)));
            assert_eq!(read(CLOSE, 0, 0, 0), Ok(Request::Close));
        }
        let mut reader = Reader { open: Some(257) };
        let endless = message(Layout::Long, ADD, 1 << 32, 0, 257);
        assert_eq!(reader.read(Layout::Long, &endless), Err(ProtocolError::Pages(1 << 32)));
    }

    #[test]
    fn a_page_map_is_written_as_criu_writes_it() {
        // The begin of a `pagemap-1.img` of CRIU 4.1.1.
        let mut map = PageMap::new(1);
        map.add(Run { address: 0x40_0000, pages: 300, flags: 4 });
        let expected = [
            0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 8, 1, 10, 0, 0, 0, 8, 0x80, 0x80,
            0x80, 2, 0x10, 0xac, 2, 0x20, 4,
        ];
        assert_eq!(map.bytes(), expected);
        assert_eq!(Owner::Process(7).pagemap(), "pagemap-7.img");
        assert_eq!(Owner::Shared(7).pagemap(), "pagemap-shmem-7.img");
    }
}
