//! Handshake of the NBD server: the options of fixed newstyle, up to the transmission phase.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::{SECTOR, invalid};
use crate::source::vddk::host::disk::{Disk, MAX_REQUEST};
use crate::source::vddk::host::reply::CONTEXT_ID;

/// Name of the only context.
const CONTEXT: &[u8] = b"base:allocation";

/// Longest option in bytes. The options that are known are far shorter.
const MAX_OPTION: u32 = 16 << 10;

/// Options of a handshake. The parent needs ten.
const MAX_OPTIONS: u32 = 100;

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Flags of the handshake: fixed newstyle, no zeroes after the reply to EXPORT_NAME.
const HANDSHAKE_FLAGS: u16 = 3;

/// Flags of an export.
mod export {
    pub(super) const HAS_FLAGS: u16 = 1;
    pub(super) const READ_ONLY: u16 = 1 << 1;
    pub(super) const FLUSH: u16 = 1 << 2;
    pub(super) const FUA: u16 = 1 << 3;
    pub(super) const DF: u16 = 1 << 7;
    pub(super) const MULTI_CONN: u16 = 1 << 8;
}

/// Options of the protocol.
mod option {
    pub(super) const EXPORT_NAME: u32 = 1;
    pub(super) const ABORT: u32 = 2;
    pub(super) const LIST: u32 = 3;
    pub(super) const INFO: u32 = 6;
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
    pub(super) const LIST_META_CONTEXT: u32 = 9;
    pub(super) const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
mod reply {
    pub(super) const ACK: u32 = 1;
    pub(super) const SERVER: u32 = 2;
    pub(super) const INFO: u32 = 3;
    pub(super) const META_CONTEXT: u32 = 4;
    pub(super) const UNSUPPORTED: u32 = (1 << 31) + 1;
    pub(super) const INVALID: u32 = (1 << 31) + 3;
    pub(super) const UNKNOWN: u32 = (1 << 31) + 6;
}

/// Result of the negotiation between client and server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Negotiated {
    /// Reads are answered by structured replies.
    pub(super) structured: bool,
    /// The client may ask for block status.
    pub(super) block_status: bool,
}

/// Performs the handshake. Returns `None` if the client ends it.
pub(super) fn negotiate(reader: &mut impl Read, writer: &UnixStream, disk: &Disk) -> io::Result<Option<Negotiated>> {
    let mut writer = writer;
    writer.write_all(&[&GREETING[..], &HANDSHAKE_FLAGS.to_be_bytes()].concat())?;
    let flags = u32::from_be_bytes(read(reader)?);
    if flags & 1 == 0 || flags & !u32::from(HANDSHAKE_FLAGS) != 0 {
        return Err(invalid("the client does not speak the fixed newstyle handshake"));
    }
    let mut negotiated = Negotiated::default();
    for _ in 0..MAX_OPTIONS {
        let (code, data) = read_option(reader)?;
        let answer = |kind: u32, text: &[u8]| answer(writer, code, kind, text);
        match code {
            option::EXPORT_NAME if data.is_empty() => {
                let mut text = disk.size().to_be_bytes().to_vec();
                text.extend(export_flags(disk).to_be_bytes());
                // Zeroes that the oldest form of the protocol reserves, unless the client has agreed to leave them out.
                text.extend(vec![0; if flags & 2 == 0 { 124 } else { 0 }]);
                writer.write_all(&text)?;
                return Ok(Some(negotiated));
            }
            // The option has no reply that refuses it.
            option::EXPORT_NAME => return Err(invalid("there is no export of that name")),
            option::ABORT => {
                answer(reply::ACK, &[])?;
                return Ok(None);
            }
            option::LIST if data.is_empty() => {
                answer(reply::SERVER, &[0; 4])?;
                answer(reply::ACK, &[])?;
            }
            option::INFO | option::GO => match asked_info(&data) {
                Some([]) => {
                    info(disk, &answer)?;
                    answer(reply::ACK, &[])?;
                    if code == option::GO {
                        return Ok(Some(negotiated));
                    }
                }
                Some(_) => answer(reply::UNKNOWN, &[])?,
                None => answer(reply::INVALID, &[])?,
            },
            option::STRUCTURED_REPLY if data.is_empty() => {
                negotiated.structured = true;
                answer(reply::ACK, &[])?;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                let set = code == option::SET_META_CONTEXT;
                // Block status is only defined with structured replies.
                match asked_contexts(&data).filter(|_| negotiated.structured) {
                    Some(queries) => {
                        let matches = queries.iter().any(|q| *q == CONTEXT || (!set && *q == b"base:"));
                        let chosen = disk.has_extents() && (matches || (!set && queries.is_empty()));
                        if chosen {
                            answer(reply::META_CONTEXT, &[&CONTEXT_ID.to_be_bytes(), CONTEXT].concat())?;
                        }
                        if set {
                            // Each SET replaces the earlier one, also by nothing.
                            negotiated.block_status = chosen;
                        }
                        answer(reply::ACK, &[])?;
                    }
                    None => answer(reply::INVALID, &[])?,
                }
            }
            option::LIST | option::STRUCTURED_REPLY => answer(reply::INVALID, &[])?,
            _ => answer(reply::UNSUPPORTED, &[])?,
        }
    }
    Err(invalid("the handshake has no end"))
}

/// Answers a request for the properties of the export: its size, flags and block sizes.
fn info(disk: &Disk, answer: &impl Fn(u32, &[u8]) -> io::Result<()>) -> io::Result<()> {
    const EXPORT: u16 = 0;
    const BLOCK_SIZE: u16 = 3;
    let mut text = EXPORT.to_be_bytes().to_vec();
    text.extend(disk.size().to_be_bytes());
    text.extend(export_flags(disk).to_be_bytes());
    answer(reply::INFO, &text)?;
    let mut text = BLOCK_SIZE.to_be_bytes().to_vec();
    // A server far away is asked for as much as it permits at a time.
    let preferred = if disk.is_inline() { 4096 } else { MAX_REQUEST };
    for size in [SECTOR as u32, preferred, MAX_REQUEST] {
        text.extend(size.to_be_bytes());
    }
    answer(reply::INFO, &text)
}

fn export_flags(disk: &Disk) -> u16 {
    let writable = if disk.is_writable() {
        export::FLUSH | export::FUA
    } else {
        export::READ_ONLY
    };
    export::HAS_FLAGS | export::DF | export::MULTI_CONN | writable
}

fn read_option(reader: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    let magic: [u8; 8] = read(reader)?;
    let code = u32::from_be_bytes(read(reader)?);
    let len = u32::from_be_bytes(read(reader)?);
    if magic != *OPTION_MAGIC || len > MAX_OPTION {
        return Err(invalid("malformed option"));
    }
    let mut data = vec![0; len as usize];
    reader.read_exact(&mut data)?;
    Ok((code, data))
}

/// Returns the name of the export that INFO or GO asks for.
fn asked_info(data: &[u8]) -> Option<&[u8]> {
    let mut rest = data;
    let name = text(&mut rest)?;
    let count = usize::from(u16::from_be_bytes(take(&mut rest)?));
    (rest.len() == 2 * count).then_some(name)
}

/// Returns the queries for contexts of the export without a name.
fn asked_contexts(data: &[u8]) -> Option<Vec<&[u8]>> {
    let mut rest = data;
    text(&mut rest).filter(|name| name.is_empty())?;
    let count = u32::from_be_bytes(take(&mut rest)?);
    // `count` is not trusted: the queries end with the data, of which there are 16 KiB at most.
    let queries = (0..count).map_while(|_| text(&mut rest)).collect::<Vec<_>>();
    (rest.is_empty() && queries.len() == count as usize).then_some(queries)
}

/// Takes a text with its length in front.
fn text<'d>(rest: &mut &'d [u8]) -> Option<&'d [u8]> {
    let len = u32::from_be_bytes(take(rest)?) as usize;
    let (text, after) = rest.split_at_checked(len)?;
    *rest = after;
    Some(text)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (bytes, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*bytes)
}

fn answer(mut writer: &UnixStream, option: u32, kind: u32, text: &[u8]) -> io::Result<()> {
    let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
    reply.extend(option.to_be_bytes());
    reply.extend(kind.to_be_bytes());
    reply.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    reply.extend(text);
    writer.write_all(&reply)
}

fn read<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}
