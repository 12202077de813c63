/* LD_PRELOAD this: every fsync and fdatasync takes 20 ms more, as on a worn SD card or a disk that others use. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

static int slowly(const char *name, int fd)
{
    struct timespec delay = {.tv_nsec = 20 * 1000 * 1000};
    int (*own)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);

    nanosleep(&delay, NULL);
    return own(fd);
}

int fsync(int fd)
{
    return slowly("fsync", fd);
}

int fdatasync(int fd)
{
    return slowly("fdatasync", fd);
}
