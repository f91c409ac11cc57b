#!/bin/sh
# Run the command as the owner of /app, so that whatever a run leaves in the mounted folder belongs to the user who
# mounted it. A container started with --user, or on a folder of root's (rootless engines show the user so), stays as it is.
set -eu
owner=$(stat -c %u:%g /app)
if [ "$(id -u)" = 0 ] && [ "${owner%:*}" != 0 ]; then
  # What root has left in the caches, as a folder that the engine made to mount something there.
  mkdir -p "$HOME"
  find "$HOME" -user root -exec chown -h "$owner" {} +
  # A Jetson's GPU is open to the groups of its device files alone (video, render), by the host's numbers.
  groups=$(for device in /dev/nv* /dev/nvgpu/*/* /dev/dri/*; do
    [ ! -c "$device" ] || stat -c %g "$device"
  done | sort -u | paste -s -d ,)
  exec setpriv --reuid "${owner%:*}" --regid "${owner#*:}" --groups "${groups:-${owner#*:}}" -- "$@"
fi
exec "$@"
