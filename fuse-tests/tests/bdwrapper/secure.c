/*
 * Prints for each name whether it is a disk. Linked with the library; run as a set-user-ID program and as an ordinary one.
 *
 *   secure NAME...
 */
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(int count, char **arguments)
{
	printf("secure %lu\n", getauxval(AT_SECURE));
	for (int i = 1; i < count; i++) {
		unsigned int size;
		int fd = open(arguments[i], O_RDONLY);
		if (fd < 0)
			perror(arguments[i]);
		printf("%s %s\n", arguments[i], ioctl(fd, BLKPBSZGET, &size) ? "file" : "disk");
		close(fd);
	}
	return 0;
}
