#!/bin/sh
# Runs the command as the owner of /app, so that the files it leaves in the mounted folder belong to the user who mounted it.
# It changes nothing if the container was started with --user, or if /app belongs to root (in a rootless engine, that is the
# user who started it).
set -eu
owner=$(stat -c %u:%g /app)
user=${owner%:*} group=${owner#*:}
if [ "$(id -u)" = 0 ] && [ "$user" != 0 ]; then
  # Never group 0, which may use what is root's; its files stay in the user's hands.
  [ "$group" != 0 ] || group=$user
  # Hand over what root created in the caches, for example a folder that the engine made as a mount point. The folder itself
  # may be a link to a place that only the host has. Whatever fails here costs the caches, not the run.
  folder=$(readlink -m "$HOME")
  { [ -d "$folder" ] || { mkdir -p "$folder" && chown "$user:$group" "$folder"; }; } &&
    find "$HOME" -user 0 -exec chown -h "$user:$group" {} + 2>/dev/null ||
    echo "entrypoint.sh: warning: $HOME cannot be handed over to $user:$group" >&2
  # On a Jetson, besides root, only the groups of the GPU's device files (video, render) may use the GPU. Join them by
  # their numbers on the host.
  groups=$(for device in /dev/nv* /dev/nvgpu/*/* /dev/dri/*; do
    [ ! -c "$device" ] || stat -c %g "$device"
  done | sort -u | grep -vx 0 | paste -s -d ,)
  exec setpriv --reuid "$user" --regid "$group" --groups "${groups:-$group}" -- "$@"
fi
exec "$@"
