#!/bin/sh
# Runs the command as the owner of /app, so that the files it leaves in the mounted folder belong to the user who mounted it.
# It changes nothing if the container was started with --user, or if /app belongs to root (in a rootless engine, that is the
# user who started it).
set -eu
owner=$(stat -c %u:%g /app)
if [ "$(id -u)" = 0 ] && [ "${owner%:*}" != 0 ]; then
  # Hand over what root created in the caches, for example a folder that the engine made as a mount point.
  mkdir -p "$HOME"
  find "$HOME" -user root -exec chown -h "$owner" {} +
  # On a Jetson, besides root, only the groups of the GPU's device files (video, render) may use the GPU. Join them by
  # their numbers on the host.
  groups=$(for device in /dev/nv* /dev/nvgpu/*/* /dev/dri/*; do
    [ ! -c "$device" ] || stat -c %g "$device"
  done | sort -u | paste -s -d ,)
  exec setpriv --reuid "${owner%:*}" --regid "${owner#*:}" --groups "${groups:-${owner#*:}}" -- "$@"
fi
exec "$@"
