//! Guests of one sector, which a PC's firmware runs: up in seconds, with no operating system.

use std::io;
use std::path::Path;

/// Where a guest's code is, in its memory.
pub const START: usize = 0x7c00;
/// Bytes of a disk.
const DISK: usize = 1 << 20;

/// Counts some nine times a second, in its memory and on its disk, so that each of its states differs
/// from the one before in a few pages.
///
/// Real mode, loaded at 0x7c00 with the drive's number in `dl`:
///
/// ```text
///         cli; xor ax,ax; mov ds,ax; mov ss,ax; mov sp,0x7c00
///         mov [drive],dl
///         mov ax,0x2000; mov es,ax
///         sti
/// again:  inc dword [counter]
///         mov eax,[counter]; mov [0x8000],eax
///         mov ebx,eax; shl ebx,2; and ebx,0xfffc; mov es:[bx],eax
///         and eax,63; add eax,64; mov [lba],eax
///         mov si,packet; mov dl,[drive]; mov ax,0x4300; int 0x13     ; write a sector
///         mov cx,2
/// pause:  hlt; loop pause                                            ; two ticks of the timer
///         jmp again
/// packet: db 16,0; dw 1,0x8000,0
/// lba:    dd 0,0
/// counter:dd 0
/// drive:  db 0
/// ```
///
/// It writes 64 sectors in turn, from the 64th on.
pub const COUNTS: [u8; 104] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0x88, 0x16, 0x67, 0x7c, 0xb8, 0x00,
    0x20, 0x8e, 0xc0, 0xfb, 0x66, 0xff, 0x06, 0x63, 0x7c, 0x66, 0xa1, 0x63, 0x7c, 0x66, 0xa3, 0x00,
    0x80, 0x66, 0x89, 0xc3, 0x66, 0xc1, 0xe3, 0x02, 0x66, 0x81, 0xe3, 0xfc, 0xff, 0x00, 0x00, 0x26,
    0x66, 0x89, 0x07, 0x66, 0x83, 0xe0, 0x3f, 0x66, 0x83, 0xc0, 0x40, 0x66, 0xa3, 0x5b, 0x7c, 0xbe,
    0x53, 0x7c, 0x8a, 0x16, 0x67, 0x7c, 0xb8, 0x00, 0x43, 0xcd, 0x13, 0xb9, 0x02, 0x00, 0xf4, 0xe2,
    0xfd, 0xeb, 0xc1, 0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
/// Where that counts, in its memory.
pub const COUNTER: usize = START + 0x63;

/// A sector that shows each key that is pressed, and counts them.
pub const KEYS: [u8; 22] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x8e, 0xc0, // mov es, ax
    0x31, 0xdb, // xor bx, bx
    0x31, 0xc0, // xor ax, ax
    0xcd, 0x16, // int 0x16: wait for a key
    0xfe, 0x06, 0x00, 0x7e, // inc byte [0x7e00]
    0xb4, 0x0e, // mov ah, 0x0e
    0xcd, 0x10, // int 0x10: show it
    0xeb, 0xf2, // jmp: the next
];
/// Where it counts them, in its memory.
pub const KEY_COUNT: usize = 0x7e00;

/// Reads a sector of its disk for each key that is pressed, each 4 MiB behind the one before, and counts keys and
/// sectors.
///
/// Real mode, loaded at 0x7c00 with the drive's number in `dl`:
///
/// ```text
///         xor ax,ax; mov ds,ax; mov es,ax; mov [drive],dl
/// again:  xor ax,ax; int 0x16                                        ; wait for a key
///         inc byte [0x7e00]
///         add dword [lba],0x2000
///         mov si,packet; mov dl,[drive]; mov ah,0x42; int 0x13       ; read a sector
///         jc again
///         inc byte [0x7e01]
///         jmp again
/// packet: db 16,0; dw 1,0x8000,0
/// lba:    dd 0,0
/// drive:  db 0
/// ```
pub const READS: [u8; 63] = [
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x88, 0x16, 0x3e, 0x7c, 0x31, 0xc0, 0xcd, 0x16, 0xfe, 0x06,
    0x00, 0x7e, 0x66, 0x81, 0x06, 0x36, 0x7c, 0x00, 0x20, 0x00, 0x00, 0xbe, 0x2e, 0x7c, 0x8a, 0x16,
    0x3e, 0x7c, 0xb4, 0x42, 0xcd, 0x13, 0x72, 0xe2, 0xfe, 0x06, 0x01, 0x7e, 0xeb, 0xdc, 0x10, 0x00,
    0x01, 0x00, 0x00, 0x80, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
/// Where that counts what it has read, in its memory.
pub const READ_COUNT: usize = 0x7e01;
/// Where it has the sector that it read last, in its memory.
pub const READ_AT: usize = 0x8000;
/// How far each sector that it reads is behind the one before, in bytes.
pub const READ_STEP: usize = 4 << 20;

/// Writes a disk that begins with this code, and with `after` behind it.
///
/// # Errors
/// When it can't be written, or both are too long for a sector.
pub fn write_disk(path: &Path, code: &[u8], after: &[u8]) -> io::Result<()> {
    let mut disk = vec![0; DISK];
    let sector = [code, after].concat();
    if sector.len() > 510 {
        return Err(io::Error::other("more than a sector holds"));
    }
    disk[..sector.len()].copy_from_slice(&sector);
    // What makes a sector one to boot from.
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(path, disk)
}
