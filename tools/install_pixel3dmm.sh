#!/bin/bash
# Installs Pixel3DMM, the alternative tracker (tracking.backend: pixel3dmm), beside this pipeline:
#
#     tools/install_pixel3dmm.sh [FOLDER]        default: third_party/pixel3dmm
#
# 1. checks out the commits of envs/pixel3dmm-commits.tsv (or CAP4D_PIXEL3DMM_COMMITS), and writes
#    hashes into it where there are none yet;
# 2. makes FOLDER/.venv: by conda, mamba or micromamba from envs/pixel3dmm.yaml, or, with
#    PIXEL3DMM_PYTHON=/path/to/python, from a Python that has what it needs;
# 3. installs the checkout and its compiled dependencies there;
# 4. runs its own installer of preprocessing networks, which asks for the FLAME login itself
#    (SKIP_PREPROCESSING=1 leaves that out);
# 5. lists what is still missing.
#
# Everything can be repeated; what is there already is kept.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$here/third_party/pixel3dmm}
commits=${CAP4D_PIXEL3DMM_COMMITS:-$here/envs/pixel3dmm-commits.tsv}
own_python=${CAP4D_PYTHON:-$here/.venv/bin/python}
# Compiled packages, by tag.
pytorch3d='git+https://github.com/facebookresearch/pytorch3d.git@V0.7.8'
nvdiffrast='git+https://github.com/NVlabs/nvdiffrast.git@v0.3.3'

fail() {
  echo "install_pixel3dmm: $*" >&2
  exit 1
}

command -v git >/dev/null || fail "git is needed"
[ -f "$commits" ] || fail "$commits is missing"
conda=$(command -v conda || command -v mamba || command -v micromamba || true)
[ -n "$conda" ] || [ -n "${PIXEL3DMM_PYTHON:-}" ] || [ -x "$folder/.venv/bin/python" ] ||
  fail "conda, mamba or micromamba is needed; or set PIXEL3DMM_PYTHON to a Python 3.9 with CUDA torch"

# Checks out one line of the list, pinning it if it is not.
checkout() {
  local path=$1 address=$2 commit=$3 target
  target=$folder/$path
  if [ ! -d "$target/.git" ]; then
    mkdir -p "$target"
    git -C "$target" init --quiet
    git -C "$target" remote add origin "$address"
  fi
  if [ "$commit" = - ]; then
    git -C "$target" fetch --quiet --depth 1 origin HEAD || fail "$address cannot be reached"
    commit=$(git -C "$target" rev-parse FETCH_HEAD)
    awk -v OFS='\t' -F'\t' -v path="$path" -v commit="$commit" \
      '$1 == path && $3 == "-" { $3 = commit } { print }' "$commits" >"$commits.new"
    mv "$commits.new" "$commits"
    echo "$path: pinned to $commit in $commits; keep that file"
  elif ! git -C "$target" cat-file -e "$commit^{commit}" 2>/dev/null; then
    git -C "$target" fetch --quiet --depth 1 origin "$commit" ||
      fail "$address has no commit $commit (see $commits), or cannot be reached"
  fi
  git -C "$target" checkout --quiet --detach "$commit"
}

while IFS=$'\t' read -r path address commit; do
  case $path in '#'* | folder | '') continue ;; esac
  checkout "$path" "$address" "$commit"
done < <(cat "$commits")

python=$folder/.venv/bin/python
if [ ! -x "$python" ]; then
  if [ -n "${PIXEL3DMM_PYTHON:-}" ]; then
    "$PIXEL3DMM_PYTHON" -m venv --system-site-packages "$folder/.venv"
  else
    "$conda" env create --yes --prefix "$folder/.venv" --file "$here/envs/pixel3dmm.yaml"
  fi
fi
if [ -f "$folder/requirements.txt" ]; then
  "$python" -m pip install --quiet --requirement "$folder/requirements.txt"
fi
for package in "pytorch3d $pytorch3d" "nvdiffrast $nvdiffrast"; do
  "$python" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('${package%% *}'))" ||
    "$python" -m pip install --quiet --no-build-isolation "${package#* }"
done
"$python" -m pip install --quiet --no-deps --no-build-isolation --editable "$folder"

installer=$folder/install_preprocessing_pipeline.sh
if [ -z "${SKIP_PREPROCESSING:-}" ] && [ -f "$installer" ]; then
  (cd "$folder" && PATH="$folder/.venv/bin:$PATH" bash "$installer")
fi

"$own_python" -m cap4d_core.tracking.pixel3dmm_installation "$folder"
echo "Set tracking.pixel3dmm_path: $folder (or PIXEL3DMM_PATH) and tracking.backend: pixel3dmm."
