#!/usr/bin/env bash
# Build, show, test and measure localdisk.
#
#   ./build.sh                      build dist/localdisk, the one file that is copied to a host
#   ./build.sh demo                 the whole life of a VM's local disk on real LVM and real libvirt, with comments
#   ./build.sh test [--all]         all of the following; --all with the whole crash matrix, not a selection, and with
#                                   all examples of the unit tests under each Python, not only under this one
#   ./build.sh lint                 formatting, lint, types; shell and Ansible files
#   ./build.sh unit [ARGUMENTS]     the unit tests; with pytest's arguments only those
#   ./build.sh kernel [ARGUMENTS]   the tests that need a kernel; with a file or pytest's arguments only those
#   ./build.sh crash [ARGUMENTS]    the crash matrix: --match TEXT, --every N, --all
#   ./build.sh model [SEED]         the model test in memory and on real LVM; SEED may be FIRST-LAST
#   ./build.sh bench                the table of measurements
#   ./build.sh pictures             docs/*.svg, drawn from a real run
#   ./build.sh fuzz [SECONDS]       broken input for every parser
#   ./build.sh pins                 renews pins/*.txt: every package that pip installs, and the guest's kernel
#
# Each command installs what it needs: Debian packages with apt (as root or through sudo), Python packages in .venv.
# Tests and demo run on a throw-away kernel, or on this machine's own if it has device-mapper and we are root;
# --where PLACE, or WHERE=PLACE, forces a place (tests/bed/boot.py).
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

PYTHON=/usr/bin/python3
PYTHONS=(3.9 3.10 3.11 3.12 3.13) # the file runs on each

BUILD_PACKAGES=(python3 python3-venv)
# Prometheus' promtool and node_exporter read the metrics and their alert rules.
TEST_PACKAGES=(shellcheck prometheus prometheus-node-exporter)

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo env "DEBIAN_MIRROR=${DEBIAN_MIRROR:-}" "$@"; fi
}

# need PACKAGE...: install the Debian packages that are missing
need() {
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  echo "installing: ${missing[*]}" >&2
  as_root apt-get update -qq >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

# -- Python packages: each pinned by hash; none is built from source, because a build would run unpinned code

# environment FOLDER PYTHON PINS...: a virtual environment with these pins, made again when they or its path change
environment() {
  local folder=$1 python=$2 stamp
  shift 2
  stamp=$(echo "$PWD" && "$python" --version && sha256sum "$@")
  [ "$stamp" != "$(cat "$folder/stamp" 2>/dev/null)" ] || return 0
  rm -rf "$folder"
  "$python" -m venv "$folder"
  install_pinned "$folder" "$@"
  echo "$stamp" >"$folder/stamp"
}

# install_pinned ENVIRONMENT PINS...
install_pinned() {
  local files=() file
  for file in "${@:2}"; do files+=(-r "$file"); done
  "$1/bin/python" -m pip "${PIP_QUIET[@]}" install --require-hashes --no-deps --only-binary=:all: "${files[@]}"
}
PIP_QUIET=(--disable-pip-version-check -qq)

need_ansible() {
  environment .venv/ansible "$PYTHON" pins/ansible.txt
}

# lock NAME OLDEST_PYTHON FROM...: pins/NAME.txt, for every Python from the oldest on
lock() {
  .venv/pins/bin/uv pip compile --universal --python-version "$2" --fork-strategy fewest --only-binary :all: \
    --generate-hashes --upgrade --quiet --no-annotate --custom-compile-command './build.sh pins' \
    --output-file "pins/$1.txt" "${@:3}"
}

write_pins() {
  environment .venv/pins "$PYTHON" pins/uv.txt
  lock uv 3.9 pins/uv.in
  lock program 3.9 pyproject.toml
  lock unit 3.9 pyproject.toml pins/unit.in
  lock tools 3.10 pins/tools.in --constraint pins/unit.txt
  lock ansible 3.10 pins/ansible.in
  lock fuzz 3.11 pins/fuzz.in
  as_root .venv/bin/python -B -m tests.bed.usermode >build/kernel-pins
  mv build/kernel-pins pins/kernel.txt
}

prepare() {
  need "${BUILD_PACKAGES[@]}"
  environment .venv "$PYTHON" pins/unit.txt pins/tools.txt
  mkdir -p .bed build
}

# -- the built file

# merge FROM INTO: files that two Pythons' packages both have must be equal; compiled files have different names
merge() {
  local file
  while IFS= read -r -d '' file; do
    [ ! -e "$2/$file" ] || cmp "$1/$file" "$2/$file"
  done < <(cd "$1" && find . -type f ! -path '*.dist-info/*' -print0)
  cp -r "$1/." "$2/"
}

# packages_for PYTHON FOLDER: the pinned wheels for that Python on x86-64; manylinux is what EL9's glibc has
packages_for() {
  .venv/bin/python -m pip "${PIP_QUIET[@]}" install --target "$2" --no-compile --require-hashes --no-deps \
    --only-binary=:all: --implementation cp --python-version "$1" --platform manylinux2014_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 -r pins/program.txt
  rm -rf "${2:?}/bin"
}

# all_packages FOLDER: the packages of all Pythons in one tree
all_packages() {
  local python job jobs=()
  for python in "${PYTHONS[@]}"; do
    packages_for "$python" "$1/$python" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job"; done
  for python in "${PYTHONS[@]}"; do
    mkdir -p "$1/tree"
    merge "$1/$python" "$1/tree"
  done
}

# kept_packages: print the folder of all packages; they are fetched if their pins have changed
kept_packages() {
  local folder
  folder=.venv/packages-$(cat pins/program.txt build.sh | sha256sum | cut -c1-16)
  if [ ! -e "$folder" ]; then
    rm -rf .venv/packages-*
    all_packages "$folder.unfinished"
    mv "$folder.unfinished" "$folder"
  fi
  echo "$folder"
}

# pack PACKAGES WORK: WORK/localdisk from our code and these packages
pack() {
  local work=$2 tree=$2/tree
  cp -r "$1/tree" "$tree"
  cp -r localdisk "$tree/"
  mkdir -p "$tree/localdisk/schema" "$tree/localdisk/examples"
  cp schema/localdisk.schema.json "$tree/localdisk/schema/"
  cp examples/minimal.yaml "$tree/localdisk/examples/"
  rm -f "$tree"/localdisk/zipapp/{main,begin,bootstrap,first_run,pack}.py
  # Remove what is not needed at run time: headers and sources of lxml, tests, caches, type stubs of packages.
  find "$tree" \( -name '*.pxd' -o -name '*.pxi' -o -name '*.pyx' -o -name '*.h' -o -name '*.c' -o -name '*.pyi' \
    -o -name '*.rng' -o -name '*.xsl' \) -delete
  find "$tree" -depth -type d \( -name __pycache__ -o -name tests -o -name isoschematron -o -name includes \
    -o -name html -o -name benchmarks \) -exec rm -rf {} +
  find "$tree" -path '*.dist-info/*' -type f ! -iname '*licen[cs]e*' ! -iname 'copying*' -delete
  find "$tree" -name py.typed -delete
  find "$tree" -type d -empty -delete
  # Of lxml keep only the tree and its imports; modules that also exist in Python are fast enough.
  find "$tree/lxml" -type f ! -name '__init__.py' ! -name 'etree.*' ! -name '_elementpath.py' -delete
  find "$tree/yaml" -name '_yaml.*.so' -delete
  find "$tree" -type d -empty -delete
  # -I: use nothing of the environment; -S: use nothing of the host's site-packages, whose .pth files and
  # sitecustomize would otherwise run as root.  It also saves a tenth of a hook run without the property.
  .venv/bin/shiv --reproducible --site-packages "$tree" --entry-point localdisk.cli:main \
    --python "$PYTHON -IS" --output-file "$work/localdisk.shiv"
  "$PYTHON" -m localdisk.zipapp.pack "$work/localdisk.shiv" "$work/localdisk"
}

# work_folder: print a new folder in build/; remove the folders of killed runs
work_folder() {
  local folder
  for folder in build/*.work; do
    [ -e "/proc/$(basename "$folder" .work)" ] || rm -rf "$folder"
  done
  mkdir "build/$$.work"
  echo "build/$$.work"
}

build() {
  local work lock
  exec {lock}<build.sh
  flock "$lock" # two at once would be in each other's way
  mkdir -p dist
  work=$(work_folder)
  pack "$(kept_packages)" "$work"
  mv "$work/localdisk" dist/localdisk
  rm -rf "$work"
  echo "dist/localdisk: $(stat -c %s dist/localdisk) bytes, $(dist/localdisk --version)" >&2
  exec {lock}<&-
}

# Build only if a source is newer than the built file.
build_if_older() {
  local newer
  newer=$(find localdisk schema examples/minimal.yaml pins/program.txt build.sh -newer dist/localdisk 2>/dev/null ||
    echo missing)
  [ -z "$newer" ] || build
}

# Build again from newly fetched packages: the file must be the same.
build_again() {
  local work
  work=$(work_folder)
  all_packages "$work/packages"
  pack "$work/packages" "$work"
  cmp "$work/localdisk" dist/localdisk
  rm -rf "$work"
}

# -- the tests

lint() {
  .venv/bin/ruff check --quiet localdisk tests
  .venv/bin/ruff format --check --quiet localdisk tests
  .venv/bin/mypy --no-error-summary
  (cd examples/ansible && PATH="$OLDPWD/.venv/ansible/bin:$PATH" ansible-lint --offline -q --profile production .)
  shellcheck build.sh .ci/run tests/bed/guest.sh tests/bed/usermode.sh
}

# unit_tests PYTHON [ARGUMENTS]: under that Python, with a random PYTHONHASHSEED that is the same for all processes
unit_tests() {
  local seed=${PYTHONHASHSEED:-$((RANDOM))} temporary verdict=0
  temporary=$(mktemp -d /tmp/ld.XXXXXX)
  PYTHONHASHSEED=$seed "$1" -m pytest -q --basetemp "$temporary/t" "${@:2}" || verdict=$?
  rm -rf "$temporary"
  [ $verdict = 0 ] || echo "PYTHONHASHSEED=$seed"
  return $verdict
}

# unit_under PYTHON [--all]: run the unit tests under another Python that the file supports.  Tests whose result is the
# same are left out: tests of the built file start it under each Python themselves, and tests of imports read the source.
# Without --all, the random chains and the walks of the model are left out, too, and Hypothesis draws a fifth of the
# examples: Pythons differ in syntax, library and compiled packages, which the first examples show.
unit_under() {
  local folder less=()
  folder=.venv/$(basename "$1")
  environment "$folder" "$1" pins/unit.txt
  if [ "${2:-}" != --all ]; then
    less=(--ignore tests/unit/test_model.py --deselect tests/unit/hook/test_copy.py::test_random_chains)
    export LOCALDISK_EXAMPLES_PART=5
  fi
  unit_tests "$folder/bin/python" -p no:cacheprovider --ignore tests/unit/test_artifact.py \
    --ignore tests/unit/test_imports.py "${less[@]}"
}

# bed COMMAND...: run Python with it as root on a real kernel with device-mapper, on disks of DISK_SIZE MiB
bed() {
  boot --disk-size "${DISK_SIZE:-8192}" -- .venv/bin/python "$@"
}

boot() {
  as_root .venv/bin/python -B -m tests.bed.boot --where "${WHERE:-auto}" "$@"
}

# suite PART...: run these parts of the tests side by side
suite() {
  .venv/bin/python -m tests.suite --where "${WHERE:-auto}" "$@"
}

# The arguments of pytest in the bed: a name without a folder is a file of tests/kernel.
kernel_arguments() {
  local word has_file='' is_expression=''
  for word in "$@"; do
    if [ -z "$is_expression" ]; then
      if [ -e "tests/kernel/${word%%::*}" ]; then
        word=tests/kernel/$word
      fi
      [ ! -e "${word%%::*}" ] || has_file=1
    fi
    case "$word" in -k | -m) is_expression=1 ;; *) is_expression='' ;; esac
    printf '%s\0' "$word"
  done
  [ -n "$has_file" ] || printf 'tests/kernel\0'
}

main() {
  local arguments=()
  case "$1" in
    build) build ;;
    pins) write_pins ;;
    fuzz)
      install_pinned .venv pins/fuzz.txt
      .venv/bin/python -m tests.fuzz --seconds "${2:-600}"
      ;;
    demo)
      if [ $# -gt 1 ]; then
        echo "build.sh: demo takes no argument but --where PLACE" >&2
        exit 2
      fi
      build_if_older
      bed -m tests.demo
      ;;
    lint)
      need "${TEST_PACKAGES[@]}"
      need_ansible
      lint
      ;;
    unit)
      need "${TEST_PACKAGES[@]}"
      build_if_older
      if [ $# = 1 ]; then set -- unit -n "$(nproc)" --dist worksteal; fi
      unit_tests .venv/bin/python "${@:2}"
      ;;
    unit-under) unit_under "${@:2}" ;;
    kernel)
      need "${TEST_PACKAGES[@]}"
      build_if_older
      if [ $# = 1 ]; then
        need_ansible
        suite kernel
      else
        case "$*" in *ansible*) need_ansible ;; esac
        mapfile -d '' -t arguments < <(kernel_arguments "${@:2}")
        bed -m pytest -v "${arguments[@]}"
      fi
      ;;
    crash)
      build_if_older
      as_root .venv/bin/python -B -m tests.crash --where "${WHERE:-guest}" "${@:2}"
      ;;
    model)
      build_if_older
      export LOCALDISK_MODEL_SEED=${2:-1}
      .venv/bin/python -m pytest -q tests/unit/test_model.py
      boot -- env "LOCALDISK_MODEL_SEED=$LOCALDISK_MODEL_SEED" .venv/bin/python -m pytest -v \
        tests/kernel/test_model.py
      ;;
    build-again) build_again ;;
    test)
      need "${TEST_PACKAGES[@]}"
      local beside=()
      need_ansible &
      beside+=($!)
      # The places for guests are tried now; the suite asks for them again, and tells what was found.
      as_root .venv/bin/python -B -m tests.bed.boot --choose --where "${WHERE:-auto}" >/dev/null 2>&1 &
      beside+=($!)
      build
      wait "${beside[0]}"
      wait "${beside[1]}" || true
      suite lint build-again unit kernel crash "${@:2}"
      ;;
    pictures)
      need tmux
      build_if_older
      bed -m tests.pictures.record | .venv/bin/python -m tests.pictures.draw
      ;;
    bench)
      build_if_older
      .venv/bin/python -m tests.bench here
      bed -m tests.bench bed
      bed -m tests.bench storm
      DISK_SIZE=24576 bed -m tests.bench cache
      ;;
    *)
      echo "build.sh: unknown command $1 : see the head of this file" >&2
      exit 2
      ;;
  esac
}

arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --where)
      WHERE=${2:?a place is missing: see tests/bed/boot.py}
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
prepare
main "${arguments[@]:-build}"
