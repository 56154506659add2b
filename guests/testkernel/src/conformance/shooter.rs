//! Makes accesses in whatever paging mode and ring, and notes what came of each.
//!
//! # Protocol
//! A [`Shot`] says what is to be done, in addresses and register values: words to be written, registers to be loaded, a
//! translation to be dropped, code to be entered by IRET, words to be looked at behind it. Its second half is what came of
//! it. [`fire`] takes the processor into the mode (a [`visit`](crate::visit)), fires all shots there and comes back.
//!
//! Every shot ends in a handler: the code that is entered ends with INT 0x40 if nothing stops it before. The handler throws
//! its frame away and goes on behind the IRET with the stack that was in use there, so that nothing is left of what the
//! access did to registers and flags.
//!
//! The code is there twice, for 32-bit and for 64-bit mode, from one text. Its descriptor tables are its own, with the
//! selectors that this kernel and its visits use. It expects interrupts to be off; itself, shots, tables and stacks mapped
//! to themselves for the supervisor; and the 2 MiB at [`USER_CODE`] for the user.

use core::arch::global_asm;
use core::mem::offset_of;

use nestling_conformance::{Access, FRESH_DESCRIPTOR, Kind, NO_FAULT, Paging, UNTOUCHED, USED_DESCRIPTOR};

use crate::traps;
use crate::visit::{Mode, visit};

/// Words that a shot may write, and look at.
const STORES: usize = 10;
const LOOKS: usize = 9;

/// Where user code is copied to.
pub(super) const USER_CODE: u64 = 0x01c0_0000;
/// Where in it the 64-bit code is.
const USER_64: u64 = 0x100;
/// Bytes of a piece of code. There are one for nothing and one for each [`Kind`].
const PIECE: u64 = 16;
const PIECES: u64 = 1 + Kind::ALL.len() as u64;

/// What a shot loads, as bits of [`Shot::load`].
pub(super) const LOAD_CR0: u64 = 1 << 0;
pub(super) const LOAD_CR4: u64 = 1 << 1;
pub(super) const LOAD_EFER: u64 = 1 << 2;
pub(super) const LOAD_PKRU: u64 = 1 << 3;
pub(super) const LOAD_CR3: u64 = 1 << 4;
pub(super) const INVALIDATE: u64 = 1 << 5;

const CODE_64: u64 = 0x08;
const DATA: u64 = 0x10;
const CODE_32: u64 = 0x18;
const USER_CODE_32: u64 = 0x23;
const USER_DATA: u64 = 0x2b;
const USER_CODE_64: u64 = 0x33;
const TASK_64: u64 = 0x38;
const LOCAL_64: u64 = 0x48;
const TASK_32: u64 = 0x58;
const LOCAL_32: u64 = 0x60;
const DESCRIPTORS: usize = 13;
/// A selector of the local table, for ring 3.
const LOCAL: u64 = 7;
const ALIGNMENT_CHECK: u64 = 1 << 18;
const GATES: usize = NO_FAULT as usize + 1;

/// One access. 32-bit mode knows the low halves of all but the words that are written and looked at.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Shot {
    pub(super) load: u64,
    pub(super) cr0: u64,
    pub(super) cr4: u64,
    pub(super) efer: u64,
    pub(super) pkru: u64,
    pub(super) cr3: u64,
    /// Whose translation is dropped.
    pub(super) invalidate: u64,
    code: u64,
    cs: u64,
    flags: u64,
    ss: u64,
    /// RDI and RCX of the code.
    linear: u64,
    count: u64,
    /// What came of it.
    pub(super) vector: u64,
    pub(super) error: u64,
    pub(super) cr2: u64,
    pub(super) value: u64,
    /// How many words are written before, and looked at behind.
    stores: u64,
    looks: u64,
    store: [[u64; 2]; STORES],
    look: [u64; LOOKS],
    pub(super) seen: [u64; LOOKS],
}

impl Shot {
    pub(super) const NONE: Self = Self {
        load: 0,
        cr0: 0,
        cr4: 0,
        efer: 0,
        pkru: 0,
        cr3: 0,
        invalidate: 0,
        code: 0,
        cs: 0,
        flags: 0,
        ss: 0,
        linear: 0,
        count: 0,
        vector: 0,
        error: 0,
        cr2: 0,
        value: 0,
        stores: 0,
        looks: 0,
        store: [[0; 2]; STORES],
        look: [0; LOOKS],
        seen: [0; LOOKS],
    };

    /// Writes a word before the access.
    pub(super) fn store(&mut self, at: u64, value: u64) {
        self.store[self.stores as usize] = [at, value];
        self.stores += 1;
    }

    /// Looks at a word behind it.
    pub(super) fn look(&mut self, at: u64) {
        self.look[self.looks as usize] = at;
        self.looks += 1;
    }

    /// Chooses the access; `None`: nothing is touched.
    pub(super) fn aim(&mut self, paging: Paging, access: Option<Access>, linear: u64, written: u32) {
        let kind = access.map(|access| access.kind);
        let piece = PIECE * kind.map_or(0, |kind| kind as u64 + 1);
        let user = access.is_some_and(|access| access.user);
        (self.code, self.cs, self.ss) = match (user, paging.is_long()) {
            (true, true) => (USER_CODE + USER_64 + piece, USER_CODE_64, USER_DATA),
            (true, false) => (USER_CODE + piece, USER_CODE_32, USER_DATA),
            (false, true) => (address(&raw const shot_code_64) + piece, CODE_64, DATA),
            (false, false) => (address(&raw const shot_code_32) + piece, CODE_32, DATA),
        };
        self.flags = 2 | if access.is_some_and(|access| access.ac) { ALIGNMENT_CHECK } else { 0 };
        self.linear = linear;
        self.count = match kind {
            Some(Kind::ReadDescriptor) => USED_DESCRIPTOR | LOCAL,
            Some(Kind::MarkDescriptor) => FRESH_DESCRIPTOR | LOCAL,
            _ => written.into(),
        };
    }
}

/// What the code knows where to find.
#[repr(C)]
struct Shooter {
    /// The stack behind the IRET.
    stack: u64,
    /// The shot, and how many are left with it.
    current: u64,
    left: u64,
    /// What LGDT and LIDT take.
    global: Pointer,
    gates: Pointer,
}

#[repr(C, align(8))]
struct Pointer([u16; 5]);

impl Pointer {
    fn to<T>(table: *const T) -> Self {
        let at = address(table);
        Self([size_of::<T>() as u16 - 1, at as u16, (at >> 16) as u16, (at >> 32) as u16, (at >> 48) as u16])
    }
}

#[unsafe(no_mangle)]
static mut SHOOTER: Shooter =
    Shooter { stack: 0, current: 0, left: 0, global: Pointer([0; 5]), gates: Pointer([0; 5]) };
static mut GLOBAL: [u64; DESCRIPTORS] = [0; DESCRIPTORS];
static mut GATES_64: [[u64; 2]; GATES] = [[0; 2]; GATES];
static mut GATES_32: [u64; GATES] = [0; GATES];
static mut TASKS: [[u32; 26]; 2] = [[0; 26]; 2];
/// Events of ring 3 begin on this one.
static mut STACK: [u64; 512] = [0; 512];

global_asm!(
    r#"
    // The registers in both their widths, and what else differs.
    .macro shooter bits, a, c, b, si, di, bp, sp, ptr, iret, popf, task, local
    .text
    .code\bits
    .p2align 4
    .global shoot_\bits
shoot_\bits:
    push \b
    push \si
    push \di
    push \bp
    mov ebp, offset SHOOTER
    lgdt [\bp + {global}]
    lidt [\bp + {gates}]
    mov eax, \task
    ltr ax
    mov eax, \local
    lldt ax
    // What ring 3 may have too: IRET takes the others away.
    mov eax, {user_data}
    mov ds, eax
    mov es, eax
    mov [\bp + {stack}], \sp
    mov \b, [\bp + {current}]
shot_next_\bits:
    mov [\bp + {current}], \b
    lea \si, [\b + {store}]
    mov ecx, [\b + {stores}]
2:  test ecx, ecx
    jz 3f
    mov \di, [\si]
    mov \a, [\si + 8]
    mov [\di], \a
    .if \bits == 32
    mov eax, [esi + 12]
    mov [edi + 4], eax
    .endif
    add \si, 16
    dec ecx
    jmp 2b
3:  mov esi, [\b + {load}]
    test esi, {load_cr0}
    jz 4f
    mov \a, [\b + {cr0}]
    mov cr0, \a
4:  test esi, {load_cr4}
    jz 5f
    mov \a, [\b + {cr4}]
    mov cr4, \a
5:  test esi, {load_efer}
    jz 6f
    mov ecx, 0xc0000080
    mov eax, [\b + {efer}]
    xor edx, edx
    wrmsr
6:  test esi, {load_pkru}
    jz 7f
    mov eax, [\b + {pkru}]
    xor ecx, ecx
    xor edx, edx
    wrpkru
7:  test esi, {load_cr3}
    jz 8f
    mov \a, [\b + {cr3}]
    mov cr3, \a
8:  test esi, {invalidate}
    jz 9f
    mov \a, [\b + {whose}]
    invlpg [\a]
9:  xor eax, eax
    mov cr2, \a
    mov \di, [\b + {linear}]
    mov ecx, [\b + {count}]
    mov \a, \sp
    push \ptr ptr [\b + {ss}]
    push \a
    push \ptr ptr [\b + {flags}]
    push \ptr ptr [\b + {cs}]
    push \ptr ptr [\b + {code}]
    mov eax, {untouched}
    \iret

    .p2align 4
    .global shot_stubs_\bits
shot_stubs_\bits:
    .set vector, 0
    .rept {vectors}
    .p2align 4
    .if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
    push 0
    .endif
    push vector
    jmp shot_trap_\bits
    .set vector, vector + 1
    .endr

shot_trap_\bits:
    mov ebp, offset SHOOTER
    mov \b, [\bp + {current}]
    mov [\b + {value}], eax
    pop \a
    mov [\b + {vector}], \a
    pop \a
    mov [\b + {error}], \a
    mov \a, cr2
    mov [\b + {cr2}], \a
    mov \sp, [\bp + {stack}]
    push 2
    \popf
    xor eax, eax
    mov gs, eax
    xor ecx, ecx
2:  cmp ecx, [\b + {looks}]
    jae 3f
    mov \si, [\b + \c * 8 + {look}]
    mov \a, [\si]
    mov [\b + \c * 8 + {seen}], \a
    .if \bits == 32
    mov eax, [esi + 4]
    mov [ebx + ecx * 8 + {seen} + 4], eax
    .endif
    inc ecx
    jmp 2b
3:  add \b, {size}
    dec dword ptr [\bp + {left}]
    jnz shot_next_\bits
    pop \bp
    pop \di
    pop \si
    pop \b
    xor eax, eax
    ret

    // What is entered: nothing, and what each kind of access does. Copied for ring 3.
    .p2align 4
    .global shot_code_\bits
shot_code_\bits:
    int 0x40
    .p2align 4
    mov eax, [\di]
    int 0x40
    .p2align 4
    mov [\di], ecx
    int 0x40
    .p2align 4
    lock xadd [\di], ecx
    mov eax, ecx
    int 0x40
    .p2align 4
    jmp \di
    .p2align 4
    lar eax, ecx
    int 0x40
    .p2align 4
    mov gs, ecx
    int 0x40
    .p2align 4
    .endm

    shooter 32, eax, ecx, ebx, esi, edi, ebp, esp, dword, iretd, popfd, {task_32}, {local_32}
    shooter 64, rax, rcx, rbx, rsi, rdi, rbp, rsp, qword, iretq, popfq, {task_64}, {local_64}
    .code64
"#,
    global = const offset_of!(Shooter, global),
    gates = const offset_of!(Shooter, gates),
    stack = const offset_of!(Shooter, stack),
    current = const offset_of!(Shooter, current),
    left = const offset_of!(Shooter, left),
    user_data = const USER_DATA,
    task_32 = const TASK_32,
    task_64 = const TASK_64,
    local_32 = const LOCAL_32,
    local_64 = const LOCAL_64,
    store = const offset_of!(Shot, store),
    stores = const offset_of!(Shot, stores),
    load = const offset_of!(Shot, load),
    load_cr0 = const LOAD_CR0,
    load_cr4 = const LOAD_CR4,
    load_efer = const LOAD_EFER,
    load_pkru = const LOAD_PKRU,
    load_cr3 = const LOAD_CR3,
    invalidate = const INVALIDATE,
    cr0 = const offset_of!(Shot, cr0),
    cr4 = const offset_of!(Shot, cr4),
    efer = const offset_of!(Shot, efer),
    pkru = const offset_of!(Shot, pkru),
    cr3 = const offset_of!(Shot, cr3),
    whose = const offset_of!(Shot, invalidate),
    linear = const offset_of!(Shot, linear),
    count = const offset_of!(Shot, count),
    ss = const offset_of!(Shot, ss),
    flags = const offset_of!(Shot, flags),
    cs = const offset_of!(Shot, cs),
    code = const offset_of!(Shot, code),
    untouched = const UNTOUCHED,
    vectors = const GATES,
    value = const offset_of!(Shot, value),
    vector = const offset_of!(Shot, vector),
    error = const offset_of!(Shot, error),
    cr2 = const offset_of!(Shot, cr2),
    looks = const offset_of!(Shot, looks),
    look = const offset_of!(Shot, look),
    seen = const offset_of!(Shot, seen),
    size = const size_of::<Shot>(),
);

unsafe extern "C" {
    static shoot_32: u8;
    static shoot_64: u8;
    static shot_stubs_32: u8;
    static shot_stubs_64: u8;
    static shot_code_32: u8;
    static shot_code_64: u8;
}

fn address<T>(thing: *const T) -> u64 {
    thing.expose_provenance() as u64
}

/// Puts user code where it belongs. Once, before anything is fired.
pub(super) fn set_up() {
    for (offset, code) in [(0, &raw const shot_code_32), (USER_64, &raw const shot_code_64)] {
        // SAFETY: this memory is nobody else's, and the labels bound that much code.
        unsafe {
            core::ptr::with_exposed_provenance_mut::<u8>((USER_CODE + offset) as usize)
                .copy_from_nonoverlapping(code, (PIECE * PIECES) as usize);
        }
    }
}

/// The tables of descriptors, as no processor has changed them yet.
fn set_up_tables(paging: Paging) {
    // A segment of the system's below 4 GiB: its limit and what it is.
    let system =
        |base: u64, limit: u64, kind: u64| limit | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56;
    let tasks = (&raw const TASKS).cast::<[u32; 26]>();
    let (task_64, task_32) = (address(tasks), address(tasks.wrapping_add(1)));
    let local = paging.linear();
    let global = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        system(task_64, 103, 0x89),
        0,
        system(local, 0xfff, 0x82),
        local >> 32,
        system(task_32, 103, 0x89),
        system(local & 0xffff_ffff, 0xfff, 0x82),
    ];
    let stack = address((&raw const STACK).wrapping_add(1)) as u32;
    let mut tasks = [[0; 26]; 2];
    // RSP0; ESP0 and SS0.
    tasks[0][1] = stack;
    (tasks[1][1], tasks[1][2]) = (stack, DATA as u32);
    let handler = |stubs: *const u8, vector: usize| address(stubs) + 16 * vector as u64;
    // An interrupt gate; ring 3 may use the last one itself.
    let gate = |handler: u64, code: u64, vector: usize| {
        let kind: u64 = if vector == usize::from(NO_FAULT) { 0xee00 } else { 0x8e00 };
        handler & 0xffff | code << 16 | kind << 32 | (handler & 0xffff_0000) << 32
    };
    let gates = if paging.is_long() { Pointer::to(&raw const GATES_64) } else { Pointer::to(&raw const GATES_32) };
    // SAFETY: between shots these are this function's alone: there is one processor, and it does not have them loaded.
    unsafe {
        (&raw mut GLOBAL).write_volatile(global);
        (&raw mut TASKS).write_volatile(tasks);
        for vector in 0..GATES {
            let long = gate(handler(&raw const shot_stubs_64, vector), CODE_64, vector);
            (&raw mut GATES_64).cast::<[u64; 2]>().add(vector).write_volatile([long, 0]);
            let short = gate(handler(&raw const shot_stubs_32, vector), CODE_32, vector);
            (&raw mut GATES_32).cast::<u64>().add(vector).write_volatile(short);
        }
        let shooter = &raw mut SHOOTER;
        (&raw mut (*shooter).global).write_volatile(Pointer::to(&raw const GLOBAL));
        (&raw mut (*shooter).gates).write_volatile(gates);
    }
}

/// Fires shots in a mode that begins with these values of CR3 and CR4.
///
/// # Safety
/// The tables map what this module expects, and the last shot leaves the control registers as this kernel has them. What
/// shots write is nobody's but the caller's.
pub(super) unsafe fn fire(paging: Paging, cr3: u64, cr4: u64, shots: &mut [Shot]) {
    if shots.is_empty() {
        return;
    }
    set_up_tables(paging);
    let (mode, code) = match paging.is_long() {
        true => (Mode::Long, &raw const shoot_64),
        false => (Mode::Paged, &raw const shoot_32),
    };
    // SAFETY: nothing is in the mode yet. The code is made for it, keeps the registers that it must, and comes back; the
    // caller vouches for the rest.
    unsafe {
        let shooter = &raw mut SHOOTER;
        (&raw mut (*shooter).current).write_volatile(address(shots.as_mut_ptr()));
        (&raw mut (*shooter).left).write_volatile(shots.len() as u64);
        visit().call(mode, cr3, cr4, address(code));
    }
    // The tables that this kernel had loaded.
    traps::set_up(0);
}
