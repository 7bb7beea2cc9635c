//! The messages and their encoding.

use thiserror::Error;

/// A packet that cannot be understood. Whoever receives one closes the connection.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The packet ends inside a field.
    #[error("packet cut short")]
    Short,
    /// Bytes are left over behind the last field.
    #[error("packet has {0} bytes too many")]
    Long(usize),
    /// The packet's kind is not one of this protocol version.
    #[error("unknown packet kind {0}")]
    Kind(u16),
    /// A text field is not UTF-8.
    #[error("text is not UTF-8")]
    Text,
    /// A count does not fit the packet.
    #[error("count {0} is more than a packet can hold")]
    Count(u32),
}

/// One physical allocation: a piece of GPU memory that one file descriptor keeps alive.
///
/// Mappings are the library's own business: they are part of the process's memory and so of CRIU's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Never used twice within a process's life.
    pub id: u64,
    /// `cuDeviceGetUuid` of the device that holds the memory.
    pub device: [u8; 16],
    /// First address it is mapped at, 0 if none. Informative.
    pub address: u64,
    /// Size in bytes, a multiple of the allocation granularity.
    pub size: u64,
    /// Table generation in which the entry was made.
    pub generation: u64,
    /// Where it came from: one of the `CLASS_` constants.
    pub class: u32,
    /// `FLAG_` constants.
    pub flags: u32,
}

/// From `cuMemAlloc` and its relatives.
pub const CLASS_PLAIN: u32 = 0;
/// A block out of which small allocations are cut.
pub const CLASS_SMALL: u32 = 1;
/// The application's own `cuMemCreate`.
pub const CLASS_VMM: u32 = 2;
/// Imported by the application from another process.
pub const CLASS_IMPORTED: u32 = 3;
/// From a stream-ordered pool that the library manages.
pub const CLASS_POOL: u32 = 4;

/// The allocation asked for `gpuDirectRDMACapable`.
pub const FLAG_RDMA: u32 = 1;
/// Imported, and surely from a process of the same container: it came by CUDA IPC, which the library emulates there.
pub const FLAG_INSIDE: u32 = 2;

/// Length of one encoded [`Entry`] in bytes.
pub const ENTRY_LEN: usize = 56;

/// What a process holds and does, for preflight and for `phos-runc gpu`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Summary {
    /// Live entries in the table.
    pub entries: u64,
    /// Bytes of GPU memory that will be parked, by class (`CLASS_` constants are the index).
    pub parked_bytes: [u64; 5],
    /// Bytes the driver will have to save: stream-ordered pools, arrays, IPC imports, what else is known.
    pub driver_bytes: u64,
    /// Bytes of pinned host memory.
    pub pinned_bytes: u64,
    /// Allocations the application holds (many can share one entry).
    pub allocations: u64,
    /// Kernel and graph launches since the library was loaded.
    pub launches: u64,
    /// Functions of the driver that the application uses and the library does not know (a newer driver).
    pub unknown_functions: u64,
    /// Each a reason why this process cannot be checkpointed now, one line of text.
    pub blockers: Vec<String>,
}

/// Where the time of a park or an attach went, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// Park: from the closing of the gate until the GPU was idle. Attach: 0.
    pub drain_us: u64,
    /// Park: sending the table and the fds until `Taken`. Attach: receiving the fds.
    pub transfer_us: u64,
    /// Park: unmap and release. Attach: import, map and access.
    pub map_us: u64,
}

/// Why the library or the host refused; see [`Message::Failed`].
pub mod failure {
    /// Another protocol version.
    pub const VERSION: u32 = 1;
    /// GPU work did not finish within the drain timeout. The gate is open again.
    pub const BUSY: u32 = 2;
    /// A CUDA call failed; the text names it and its code.
    pub const CUDA: u32 = 3;
    /// The other side broke the protocol.
    pub const PROTOCOL: u32 = 4;
    /// The process holds something that cannot be checkpointed; the text names it.
    pub const UNSUPPORTED: u32 = 5;
    /// A system call failed.
    pub const SYSTEM: u32 = 6;
}

/// One packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Host: the first packet of a conversation with a running process.
    Hello {
        /// [`crate::VERSION`] of the host.
        version: u16,
    },
    /// Library: who it is. First packet from the library in every conversation.
    HelloAck {
        /// [`crate::VERSION`] of the library.
        version: u16,
        /// Process id in the process's own PID namespace.
        pid: i32,
        /// Whether the process is parked.
        parked: bool,
        /// `cuDriverGetVersion`, e.g. 13000.
        driver: i32,
        /// Present table generation.
        generation: u64,
    },
    /// Host: asks for a [`Summary`].
    Query,
    /// Library: the answer to `Query`.
    Summary(Summary),
    /// Host: asks for the entries made after generation `since`, with copies of their fds. The application
    /// runs on.
    Table {
        /// 0 for the whole table.
        since: u64,
    },
    /// Host: stop GPU work, send what changed after generation `since`, then wait for `Taken`.
    Park {
        /// Generation up to which the host already holds entries and fds; 0 for none.
        since: u64,
        /// How long the GPU may take to finish its work, in milliseconds.
        drain_timeout_ms: u32,
        /// `PARK_` flags.
        flags: u32,
    },
    /// Entries; exactly one fd each, in the same order. Library to host in `Table` and `Park`, host to
    /// library in `Attach` (there only `id` counts).
    Entries(Vec<Entry>),
    /// Library: ids that were alive at generation `since` and are no longer.
    Removed(Vec<u64>),
    /// Library: the table is complete.
    TableEnd {
        /// Generation the table stands at.
        generation: u64,
        /// Entries alive now, for a cross-check.
        live: u64,
    },
    /// Host: holds every fd of the table. The library may let go of the memory.
    Taken,
    /// Library: nothing of the table is mapped or held by the process any more.
    Parked(Timings),
    /// Host, to a parked process: the driver has saved its state. What of it is zeros may go back to the system.
    Trim,
    /// Library: the answer to `Trim`.
    Trimmed {
        /// Bytes that went back.
        bytes: u64,
    },
    /// Host: the driver's state is back; `handles` entries with fds follow.
    Attach {
        /// Number of entries that follow; must be the number alive at park.
        handles: u64,
    },
    /// Library: all mapped, the gate is open.
    Attached(Timings),
    /// Either side: cannot do it. The connection ends.
    Failed {
        /// One of [`failure`].
        code: u32,
        /// One line.
        text: String,
    },
}

/// `Park`: lower the per-thread stack limit while parked and restore it at attach, so that the driver has
/// less to save (`CU_LIMIT_STACK_SIZE`).
pub const PARK_LOW_STACK: u32 = 1;
/// `Park`: have the memory ready into which the driver saves its state.
pub const PARK_PREFAULT: u32 = 2;

struct Writer(Vec<u8>);

impl Writer {
    fn u16(&mut self, v: u16) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    fn u32(&mut self, v: u32) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    fn text(&mut self, v: &str) {
        // A text longer than a packet's half is cut at a character boundary; it is for people.
        let mut end = v.len().min(crate::MAX_PACKET / 2);
        while !v.is_char_boundary(end) {
            end -= 1;
        }
        self.u32(end as u32);
        self.0.extend_from_slice(&v.as_bytes()[..end]);
    }
    fn timings(&mut self, t: &Timings) {
        self.u64(t.drain_us);
        self.u64(t.transfer_us);
        self.u64(t.map_us);
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        let (head, tail) = self.0.split_at_checked(n).ok_or(DecodeError::Short)?;
        self.0 = tail;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
    fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// Reads a count of items that take at least `item` bytes each.
    fn count(&mut self, item: usize) -> Result<usize, DecodeError> {
        let n = self.u32()?;
        if n as usize > self.0.len() / item {
            return Err(DecodeError::Count(n));
        }
        Ok(n as usize)
    }
    fn text(&mut self) -> Result<String, DecodeError> {
        let n = self.count(1)?;
        let bytes = self.take(n)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| DecodeError::Text)
    }
    fn timings(&mut self) -> Result<Timings, DecodeError> {
        Ok(Timings { drain_us: self.u64()?, transfer_us: self.u64()?, map_us: self.u64()? })
    }
}

impl Entry {
    fn write(&self, w: &mut Writer) {
        w.u64(self.id);
        w.0.extend_from_slice(&self.device);
        w.u64(self.address);
        w.u64(self.size);
        w.u64(self.generation);
        w.u32(self.class);
        w.u32(self.flags);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Entry {
            id: r.u64()?,
            device: r.array()?,
            address: r.u64()?,
            size: r.u64()?,
            generation: r.u64()?,
            class: r.u32()?,
            flags: r.u32()?,
        })
    }
}

impl Message {
    /// The packet's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer(Vec::with_capacity(64));
        match self {
            Message::Hello { version } => {
                w.u16(1);
                w.u16(*version);
            }
            Message::HelloAck { version, pid, parked, driver, generation } => {
                w.u16(2);
                w.u16(*version);
                w.u32(*pid as u32);
                w.u32(u32::from(*parked));
                w.u32(*driver as u32);
                w.u64(*generation);
            }
            Message::Query => w.u16(3),
            Message::Summary(s) => {
                w.u16(4);
                w.u64(s.entries);
                s.parked_bytes.iter().for_each(|b| w.u64(*b));
                w.u64(s.driver_bytes);
                w.u64(s.pinned_bytes);
                w.u64(s.allocations);
                w.u64(s.launches);
                w.u64(s.unknown_functions);
                // A blocker is one line; sixteen of them are enough to know why, and fit a packet.
                let blockers = &s.blockers[..s.blockers.len().min(16)];
                w.u32(blockers.len() as u32);
                for b in blockers {
                    let mut end = b.len().min(1024);
                    while !b.is_char_boundary(end) {
                        end -= 1;
                    }
                    w.text(&b[..end]);
                }
            }
            Message::Table { since } => {
                w.u16(5);
                w.u64(*since);
            }
            Message::Park { since, drain_timeout_ms, flags } => {
                w.u16(6);
                w.u64(*since);
                w.u32(*drain_timeout_ms);
                w.u32(*flags);
            }
            Message::Entries(entries) => {
                w.u16(7);
                w.u32(entries.len() as u32);
                entries.iter().for_each(|e| e.write(&mut w));
            }
            Message::Removed(ids) => {
                w.u16(8);
                w.u32(ids.len() as u32);
                ids.iter().for_each(|i| w.u64(*i));
            }
            Message::TableEnd { generation, live } => {
                w.u16(9);
                w.u64(*generation);
                w.u64(*live);
            }
            Message::Taken => w.u16(10),
            Message::Parked(t) => {
                w.u16(11);
                w.timings(t);
            }
            Message::Attach { handles } => {
                w.u16(12);
                w.u64(*handles);
            }
            Message::Attached(t) => {
                w.u16(13);
                w.timings(t);
            }
            Message::Trim => w.u16(15),
            Message::Trimmed { bytes } => {
                w.u16(16);
                w.u64(*bytes);
            }
            Message::Failed { code, text } => {
                w.u16(14);
                w.u32(*code);
                w.text(text);
            }
        }
        w.0
    }

    /// Reads one packet. Nothing is allocated that the packet's own length does not cover.
    pub fn decode(packet: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(packet);
        let message = match r.u16()? {
            1 => Message::Hello { version: r.u16()? },
            2 => Message::HelloAck {
                version: r.u16()?,
                pid: r.u32()? as i32,
                parked: r.u32()? != 0,
                driver: r.u32()? as i32,
                generation: r.u64()?,
            },
            3 => Message::Query,
            4 => {
                let entries = r.u64()?;
                let mut parked_bytes = [0; 5];
                for b in &mut parked_bytes {
                    *b = r.u64()?;
                }
                let (driver_bytes, pinned_bytes) = (r.u64()?, r.u64()?);
                let (allocations, launches) = (r.u64()?, r.u64()?);
                let unknown_functions = r.u64()?;
                let blockers = (0..r.count(4)?).map(|_| r.text()).collect::<Result<_, _>>()?;
                Message::Summary(Summary {
                    entries,
                    parked_bytes,
                    driver_bytes,
                    pinned_bytes,
                    allocations,
                    launches,
                    unknown_functions,
                    blockers,
                })
            }
            5 => Message::Table { since: r.u64()? },
            6 => Message::Park { since: r.u64()?, drain_timeout_ms: r.u32()?, flags: r.u32()? },
            7 => Message::Entries(
                (0..r.count(ENTRY_LEN)?).map(|_| Entry::read(&mut r)).collect::<Result<_, _>>()?,
            ),
            8 => Message::Removed((0..r.count(8)?).map(|_| r.u64()).collect::<Result<_, _>>()?),
            9 => Message::TableEnd { generation: r.u64()?, live: r.u64()? },
            10 => Message::Taken,
            11 => Message::Parked(r.timings()?),
            12 => Message::Attach { handles: r.u64()? },
            13 => Message::Attached(r.timings()?),
            14 => Message::Failed { code: r.u32()?, text: r.text()? },
            15 => Message::Trim,
            16 => Message::Trimmed { bytes: r.u64()? },
            kind => return Err(DecodeError::Kind(kind)),
        };
        match r.0.len() {
            0 => Ok(message),
            n => Err(DecodeError::Long(n)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Message> {
        let entry = Entry {
            id: 7,
            device: [9; 16],
            address: 0x7f00_0000_0000,
            size: 2 << 20,
            generation: 3,
            class: CLASS_VMM,
            flags: FLAG_RDMA,
        };
        let timings = Timings { drain_us: 1, transfer_us: 2, map_us: 3 };
        vec![
            Message::Hello { version: 1 },
            Message::HelloAck { version: 1, pid: 42, parked: true, driver: 13000, generation: 5 },
            Message::Query,
            Message::Summary(Summary {
                entries: 1,
                parked_bytes: [1, 2, 3, 4, 5],
                driver_bytes: 6,
                pinned_bytes: 7,
                allocations: 8,
                launches: 9,
                unknown_functions: 10,
                blockers: vec!["managed memory: 4096 bytes".into()],
            }),
            Message::Table { since: 4 },
            Message::Park { since: 0, drain_timeout_ms: 10, flags: PARK_LOW_STACK },
            Message::Entries(vec![entry; crate::MAX_FDS]),
            Message::Removed(vec![1, 2]),
            Message::TableEnd { generation: 8, live: 2 },
            Message::Taken,
            Message::Parked(timings),
            Message::Trim,
            Message::Trimmed { bytes: 4096 },
            Message::Attach { handles: 3 },
            Message::Attached(timings),
            Message::Failed { code: failure::BUSY, text: "kernel ✓".into() },
        ]
    }

    #[test]
    fn every_message_survives_the_wire() {
        for message in samples() {
            let bytes = message.encode();
            assert!(bytes.len() <= crate::MAX_PACKET);
            assert_eq!(Message::decode(&bytes), Ok(message));
        }
    }

    #[test]
    fn every_truncation_and_extension_is_refused() {
        for message in samples() {
            let mut bytes = message.encode();
            for n in 0..bytes.len() {
                assert!(Message::decode(&bytes[..n]).is_err(), "{message:?} cut to {n}");
            }
            bytes.push(0);
            assert!(Message::decode(&bytes).is_err(), "{message:?} with one byte more");
        }
    }

    #[test]
    fn an_absurd_count_allocates_nothing() {
        let mut bytes = vec![7, 0];
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Message::decode(&bytes), Err(DecodeError::Count(u32::MAX)));
    }
}
