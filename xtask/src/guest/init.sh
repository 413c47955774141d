#!/bin/busybox sh
# The guest's only program of ours: loads the modules, then runs the scripts that the host sends
# over the port named on the kernel's command line (agent=NAME).
#   host:  OUTBOARD BEGIN, lines of a shell script, OUTBOARD RUN
#   guest: OUTBOARD READY RELEASE     once, after start
#          | TEXT                     a line that the script printed
#          OUTBOARD EXIT NUMBER       the script has ended
export PATH=/bin:/sbin
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
ln -sf /proc/mounts /etc/mtab
for module in /modules/*.ko; do insmod "$module" || echo "cannot load $module"; done

port=$(sed -n 's/.*agent=\([^ ]*\).*/\1/p' /proc/cmdline)
exec < "/dev/$port" > "/dev/$port"
stty raw -echo
echo "OUTBOARD READY $(uname -r)"
while IFS= read -r line; do
    case $line in
    "OUTBOARD BEGIN") : > /tmp/script ;;
    "OUTBOARD RUN")
        { sh -eu /tmp/script < /dev/null 2>&1; echo $? > /tmp/status; } |
            while IFS= read -r text; do echo "| $text"; done
        echo "OUTBOARD EXIT $(cat /tmp/status)"
        ;;
    *) printf '%s\n' "$line" >> /tmp/script ;;
    esac
done
poweroff -f
