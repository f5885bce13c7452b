#!/usr/bin/env bash
# Make a Debian base image with Python 3.11 where no image registry can be reached: about 300 MB, in about a minute.
#
#   images/base.sh localhost/qlora-retrain/base:bookworm
set -euo pipefail
tag=${1:?the tag to give the image}
engine=${ENGINE:-podman}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/root" >"$folder/log" 2>&1 ||
    { tail -20 "$folder/log"; exit 1; }
rm -rf "$folder"/root/var/cache/apt/* "$folder"/root/var/lib/apt/lists/* "$folder"/root/usr/share/{doc,man,locale}/*
tar -C "$folder/root" -c . | "$engine" import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$tag"
