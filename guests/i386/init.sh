#!/bin/busybox sh
# The init of the 32-bit Linux guests: what guests/selfcheck is to the 64-bit one. It is a script, run by an i386 busybox,
# because stable Rust comes without a 32-bit target.
#
# As process 1 it mounts what a Linux userland expects, prints one line, and then does what the kernel command line says:
#
# - nestling.mode=check: run the self-check and switch the machine off; after FAIL the value 1 goes to the debug-exit port.
# - nestling.mode=shell (the default): a shell with job control on the serial console; power-off when it ends.
#
# Any other process that runs it (the shell's `selfcheck` command) runs the check and returns its verdict.
#
# nestling.ram=PERCENT sets how much of the available memory the check uses, nestling.seconds=N repeats it until that much
# time has gone, nestling.tty=ROWSxCOLUMNS sets the size of the shell's terminal.
#
# Lines that others wait for: the first (nestling-init:), the rounds of the memory check, "times good", and the verdict.
set -u

ROUNDS=3
# Processes of the storm, spread over the CPUs.
PROCESSES=120
# Lines of nine bytes in the text that the memory check repeats, less the last byte. An odd number of bytes: of the text
# repeated, each page begins somewhere else and none is like another, nor like those of other texts.
TEXT_LINES=100000
TEXT_BYTES=899999
# Files are whole blocks of this many KiB, for dd: what counts bytes one by one is slow on an emulated CPU.
BLOCK_KIB=64
FILE_BLOCKS=8

say() {
    echo "nestling-selfcheck: $*"
}

fail() {
    say "FAIL $*"
    exit 1
}

# The kernel's list format, as 0-3,5.
online_cpus() {
    local list
    local IFS=, part
    read -r list < /sys/devices/system/cpu/online
    for part in $list; do
        seq "${part%-*}" "${part#*-}"
    done
}

# Hundredths of a second since the boot, in `now`. No process is made for it: it is the kernel's clock, read from one CPU.
read_clock() {
    local up rest
    read -r up rest < /proc/uptime
    # The 1 keeps 08 from being octal.
    now=$((${up%.*} * 100 + 1${up#*.} - 100))
}

meminfo_kib() {
    sed -n "s/^$1: *\([0-9]*\) kB\$/\1/p" /proc/meminfo
}

# Binds the calling process, which may be a subshell, to a CPU.
pin_to() {
    local me rest
    read -r me rest < /proc/self/stat
    taskset -p "$(printf %x $((1 << $1)))" "$me" > /dev/null || fail "bind process $me to CPU $1"
}

# Runs a function for each CPU, on it, all at the same time: with the CPU's place, the CPU, and the other arguments.
on_all_cpus() {
    local function=$1 place=0 workers="" result=0
    shift
    for cpu in $cpus; do
        (
            pin_to "$cpu"
            "$function" "$place" "$cpu" "$@"
        ) &
        workers="$workers $!"
        place=$((place + 1))
    done
    for worker in $workers; do
        wait "$worker" || result=$?
    done
    # One that was killed has not said so. Where another has said what was wrong, that stands: it was first.
    [ $result = 0 ] || say "FAIL a process of $function ended with status $result"
    return $result
}

# Short processes: address spaces, copy-on-write, page tables made and thrown away, pipes between them.
storm() {
    local cpu=$2 own="a worker of CPU $2" round=0 stat seen
    while [ $round -lt $((PROCESSES / count)) ]; do
        (
            own="child $round"
            [ "$own" = "child $round" ] && exec busybox true
        ) || fail "storm: a process on CPU $cpu ended with status $?"
        [ "$own" = "a worker of CPU $cpu" ] || fail "storm: memory of a process on CPU $cpu is its child's"
        if [ $((round % 8)) = 0 ]; then
            seen=$(echo "$own, round $round" | cat | cat)
            [ "$seen" = "$own, round $round" ] || fail "storm: pipes on CPU $cpu brought '$seen'"
        fi
        round=$((round + 1))
    done
    read -r stat < /proc/self/stat
    # The 39th field is the CPU on which the process runs.
    set -- $stat
    shift 38
    [ "$1" = "$cpu" ] || fail "storm: a process bound to CPU $cpu is on CPU $1"
}

# The clock must not go backwards from one CPU to the next, and must wake sleepers on each.
clock() {
    local latest=0 round=0
    while [ $round -lt 10 ]; do
        for cpu in $cpus; do
            pin_to "$cpu"
            read_clock
            [ "$now" -ge "$latest" ] || fail "clock: $((latest - now)) hundredths of a second backwards, seen by CPU $cpu"
            latest=$now
        done
        round=$((round + 1))
    done
}

naps() {
    local cpu=$2 before
    read_clock
    before=$now
    usleep 20000
    read_clock
    # A loaded emulator may oversleep by much; a timer that never fires exceeds even this.
    [ $((now - before)) -ge 1 ] && [ $((now - before)) -le 1000 ] ||
        fail "clock: a sleep of 20 ms on CPU $cpu took $((now - before)) hundredths of a second"
}

# The text of a place and a round: numbers of eight digits, none of which is in another text.
make_text() {
    local first=$((10000000 + ($1 * ROUNDS + $2) * TEXT_LINES))
    seq $first $((first + TEXT_LINES - 1)) | dd bs=$TEXT_BYTES count=1 iflag=fullblock 2> /dev/null
}

# A text, repeated: so many blocks.
repeated() {
    while cat "$1"; do :; done 2> /dev/null | dd bs=${BLOCK_KIB}k count="$2" iflag=fullblock 2> /dev/null
}

# Fills the place's file anew, in the same pages.
fill() {
    local place=$1 round=$3 blocks=$4
    make_text "$place" "$round" > "$work/text-$place"
    repeated "$work/text-$place" "$blocks" 1<> "$work/pages-$place" || fail "memory: CPU $2 cannot write"
}

# Compares the file that another CPU has filled, by its sum: where they differ is looked up only if they do.
compare() {
    local cpu=$2 round=$3 blocks=$4 other=$((($1 + 1) % count)) expected found
    expected=$(repeated "$work/text-$other" "$blocks" | md5sum)
    found=$(md5sum < "$work/pages-$other")
    [ "$found" = "$expected" ] ||
        fail "memory: CPU $cpu round $round: $(repeated "$work/text-$other" "$blocks" | cmp - "$work/pages-$other" 2>&1)"
}

# Files over much of the memory: in each round each is filled by one CPU and read by another.
memory() {
    local blocks round=0
    blocks=$(($(meminfo_kib MemAvailable) / 100 * ram / count / BLOCK_KIB))
    while [ $round -lt $ROUNDS ]; do
        on_all_cpus fill $round $blocks && on_all_cpus compare $round $blocks || return 1
        round=$((round + 1))
        say "memory: round $round of $ROUNDS"
    done
    rm "$work"/pages-*
    say "memory: $((blocks * BLOCK_KIB * count / 1024)) MiB, $ROUNDS rounds, $count CPUs: good"
}

write_file() {
    repeated "$work/text-$1" $FILE_BLOCKS > "$work/file-$1" || fail "files: CPU $2 cannot write"
}

hash_file() {
    local other=$((($1 + 1) % count)) found expected
    found=$(sha256sum < "$work/file-$other")
    expected=$(repeated "$work/text-$other" $FILE_BLOCKS | sha256sum)
    [ "$found" = "$expected" ] || fail "files: file $other hashes to $found, not $expected"
}

check() {
    say "$count CPUs, $(($(meminfo_kib MemAvailable) / 1024)) MiB available"
    on_all_cpus storm || return 1
    say "storm: $((PROCESSES / count * count)) processes on $count CPUs: good"
    (clock) && on_all_cpus naps || return 1
    say "clock: 10 readings on each of $count CPUs: good"
    memory || return 1
    on_all_cpus write_file && on_all_cpus hash_file || return 1
    say "files: $count of $((FILE_BLOCKS * BLOCK_KIB)) KiB hashed: good"
}

# The check, until the time is over. Every failure has said what it was.
verdict() {
    local start rounds=1 result=0
    work=$(mktemp -d /tmp/selfcheck-XXXXXX) || fail "make a directory"
    read_clock
    start=$now
    check || result=1
    while read_clock && [ $result = 0 ] && [ $((now - start)) -lt $((seconds * 100)) ]; do
        say "$rounds times good, $(((now - start) / 100)) s"
        check || result=1
        rounds=$((rounds + 1))
    done
    rm -r "$work"
    [ $result = 0 ] && say "PASS in $(((now - start) / 100)).$(printf %02d $(((now - start) % 100))) s"
    return $result
}

prepare() {
    busybox mkdir -p /proc /sys /dev /tmp
    busybox mount -t proc proc /proc
    busybox mount -t sysfs sysfs /sys
    busybox mount -t devtmpfs devtmpfs /dev
    # What limits the check is the memory that it finds, not the file system.
    busybox mount -t tmpfs -o size=100% tmpfs /tmp
    busybox --install -s /bin
    ln -s /init /bin/selfcheck
}

# What was printed has left the serial port when the settings of the terminal, changed in between, have taken effect.
drain() {
    stty -F /dev/console opost
}

run_shell() {
    echo "nestling-init: \`selfcheck\` checks this guest; leaving the shell switches it off"
    [ -z "$tty" ] || stty -F /dev/ttyS0 rows "${tty%x*}" columns "${tty#*x}"
    cd /
    env -i PATH=/bin HOME=/ TERM=xterm PS1='guest:\w# ' setsid sh -c 'exec sh -i < /dev/ttyS0 > /dev/ttyS0 2>&1'
}

PATH=/bin
export PATH
[ $$ != 1 ] || prepare

mode=shell ram=20 seconds=0 tty=""
read -r words < /proc/cmdline
# Later words win, as they do in the kernel; what is mistyped leaves the default.
for word in $words; do
    value=${word#*=}
    case $word in
        nestling.mode=check | nestling.mode=shell) mode=$value ;;
        nestling.ram=[1-9] | nestling.ram=[1-8][0-9] | nestling.ram=9[0-5]) ram=$value ;;
        nestling.seconds=*[!0-9]* | nestling.seconds=) ;;
        nestling.seconds=*) seconds=$value ;;
        nestling.tty=[0-9]*x[0-9]*) tty=$value ;;
    esac
done
cpus=$(online_cpus)
count=$(echo "$cpus" | wc -l)

if [ $$ != 1 ]; then
    verdict
    exit
fi
read -r up rest < /proc/uptime
echo "nestling-init: $(uname -sr) is up after $up s, $count CPUs, $(($(meminfo_kib MemTotal) / 1024)) MiB"
if [ $mode = check ]; then
    if ! verdict; then
        drain
        printf '\001' | dd of=/dev/port bs=1 seek=$((0xf4)) conv=notrunc 2> /dev/null
    fi
else
    run_shell
fi
drain
poweroff -f
