# shellcheck shell=bash
# What the launchers share; sourced by them, never run. Bash 3.2, which a Mac has, is enough.
#
# A launcher reads its arguments with `parse`, asks for them with `flag`, and does each thing
# through `run`, which under --dry-run prints the command instead.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run='' config='' workdir='' rest=() train=()

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the head of the launcher.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Its arguments as one line that a POSIX shell reads back as the same words.
quote() {
  local LC_ALL=C word line=''
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

run() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# The value of the launcher's flag --NAME, or DEFAULT: flag NAME [DEFAULT].
flag() {
  local variable=flag_${1//-/_}
  printf '%s' "${!variable:-${2:-}}"
}

# parse "NAME ..." "SWITCH ..." ARGUMENT...: the launcher's --NAME=VALUE and --SWITCH, and the
# flags of train.py.
parse() {
  local names=" $1 " switches=" $2 " word name
  shift 2
  for word in "$@"; do
    name=${word#--} name=${name%%=*}
    case $word in
      *$'\n'*) fail "an argument has a line break in it: $(printf '%q' "$word")" ;;
      --help | -h)
        usage
        exit 0
        ;;
      --dry-run) dry_run=1 ;;
      --config=*) config=${word#*=} ;;
      --workdir=*) workdir=${word#*=} ;;
      --config.?*=* | --start_timeout=?* | --heartbeat_timeout=?*) rest+=("$word") ;;
      --config | --config.?* | --workdir) fail "$word needs a value: $word=VALUE" ;;
      --?*)
        if [[ $switches == *" $name "* && $word != *=* ]]; then
          printf -v "flag_${name//-/_}" 1
        elif [[ $names != *" $name "* ]]; then
          fail "unknown argument '$word'; $0 --help lists them"
        elif [[ $word != *=?* ]]; then
          fail "--$name needs a value: --$name=VALUE"
        else
          printf -v "flag_${name//-/_}" %s "${word#*=}"
        fi
        ;;
      *) fail "unknown argument '$word'; $0 --help lists them" ;;
    esac
  done
}

require() {
  local name
  for name in "$@"; do
    [[ $(flag "$name") ]] || fail "--$name=VALUE is missing; $0 --help explains it"
  done
}

# Checks the flags of train.py and puts its words in `train`. With "far", the hosts of the run do
# not share this machine's directories.
require_run() {
  local known
  [[ $config ]] || fail "--config=FILE is missing; for example --config=configs/vmoe_15b.py"
  [[ $workdir ]] || fail "--workdir=DIR is missing: a directory that every host sees"
  if [[ $config == /* || ! -f $root/$config ]]; then
    known=$(cd "$root" && printf ', %s' configs/[!_]*.py)
    fail "no config file '$config' in this checkout; there are ${known#, }"
  fi
  if [[ $workdir == *://* ]]; then
    fail "--workdir=$workdir: train.py writes to files; mount the bucket on every host and give" \
      "the path there, see docs/launch.md"
  fi
  if [[ ${1:-} == far && $workdir != /* ]]; then
    fail "--workdir=$workdir: expected an absolute path that every host sees, as /mnt/BUCKET/run"
  fi
  # shellcheck disable=SC2034 # the launchers read it
  train=(train.py "--config=$config" "--workdir=$workdir" ${rest[@]+"${rest[@]}"})
}

# To the checkout, so that relative paths mean the same in a dry run and on every host.
at_root() {
  [[ $PWD -ef $root ]] || run cd "$root" || exit
}
