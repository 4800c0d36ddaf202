/*
 * Checks every answer that libvmware-bdwrapper gives for one listed disk. Run under LD_PRELOAD:
 *
 *   answers NAME ide|scsi SECTORS rw|ro SERIAL
 *
 * Prints each check that fails; exits with 1 if any did.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/hdreg.h>
#include <scsi/scsi_ioctl.h>
#include <scsi/sg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "check.h"

/* scsi/scsi.h of the kernel, which no package installs. */
#ifndef SCSI_IOCTL_GET_IDLUN
#define SCSI_IOCTL_GET_IDLUN 0x5382
#define SCSI_IOCTL_GET_BUS_NUMBER 0x5386
#endif

/* Calls an ioctl that must succeed and leave errno and the bytes behind its value alone. */
static void get(int fd, unsigned long number, void *value, size_t len)
{
	unsigned char room[1024];
	memset(room, 0xee, sizeof room);
	errno = 4711;
	int result = ioctl(fd, number, room);
	CHECK(result == 0, "ioctl %#lx returned %d", number, result);
	CHECK(errno == 4711, "ioctl %#lx changed errno", number);
	for (size_t i = len; i < sizeof room; i++)
		if (room[i] != 0xee) {
			CHECK(0, "ioctl %#lx wrote byte %zu of %zu", number, i, len);
			break;
		}
	memcpy(value, room, len);
	/* Programs that keep the number in an int extend its sign. */
	CHECK(ioctl(fd, (unsigned long)(long)(int)number, room) == 0, "ioctl %#lx as an int", number);
	CHECK(ioctl(fd, number, NULL) == -1 && errno == EFAULT, "ioctl %#lx to NULL", number);
	CHECK(ioctl(fd, number, (void *)16) == -1 && errno == EFAULT, "ioctl %#lx to address 16", number);
}

static long get_int(int fd, unsigned long number)
{
	int value;
	get(fd, number, &value, sizeof value);
	return value;
}

static void block_layer(int fd, uint64_t sectors, int read_only)
{
	unsigned long size;
	uint64_t bytes;
	long read_ahead;
	get(fd, BLKGETSIZE, &size, sizeof size);
	CHECK(size == sectors, "%lu", size);
	get(fd, BLKGETSIZE64, &bytes, sizeof bytes);
	CHECK(bytes == sectors * 512, "%llu", (unsigned long long)bytes);
	get(fd, BLKRAGET, &read_ahead, sizeof read_ahead);
	CHECK(read_ahead == 256, "%ld", read_ahead);
	CHECK(get_int(fd, BLKSSZGET) == 512, "logical sector");
	CHECK(get_int(fd, BLKPBSZGET) == 512, "physical sector");
	CHECK(get_int(fd, BLKBSZGET) == 4096, "block size");
	CHECK(get_int(fd, BLKIOMIN) == 512, "smallest request");
	CHECK(get_int(fd, BLKIOOPT) == 0, "best request");
	CHECK(get_int(fd, BLKALIGNOFF) == 0, "alignment");
	CHECK(get_int(fd, BLKROGET) == read_only, "read-only");
	CHECK(ioctl(fd, BLKRRPART, 0) == 0, "partition table");
	CHECK(ioctl(fd, BLKFLSBUF, 0) == 0, "flush");
}

static unsigned word(const unsigned char *id, int at)
{
	return id[2 * at] | id[2 * at + 1] << 8;
}

static uint64_t words(const unsigned char *id, int at, int count)
{
	uint64_t value = 0;
	for (int i = count - 1; i >= 0; i--)
		value = value << 16 | word(id, at + i);
	return value;
}

static void text(const unsigned char *id, int at, int count, char *out)
{
	for (int i = 0; i < count; i++) {
		out[2 * i] = id[2 * (at + i) + 1];
		out[2 * i + 1] = id[2 * (at + i)];
	}
	out[2 * count] = 0;
}

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static void identify(int fd, uint64_t sectors, const char *serial)
{
	unsigned char id[512], sum = 0;
	char name[41];
	get(fd, HDIO_GET_IDENTITY, id, sizeof id);
	for (int i = 0; i < 512; i++)
		sum += id[i];
	CHECK(sum == 0 && id[510] == 0xa5, "checksum %d", sum);
	CHECK(word(id, 1) == least(sectors / 1008, 16383), "%u cylinders", word(id, 1));
	CHECK(word(id, 3) == 16 && word(id, 6) == 63, "%u heads", word(id, 3));
	CHECK(words(id, 60, 2) == least(sectors, 0xfffffff), "LBA28");
	CHECK(words(id, 100, 4) == sectors, "LBA48 %llu", (unsigned long long)words(id, 100, 4));
	CHECK(word(id, 83) & 0x400 && word(id, 86) & 0x400, "LBA48 is supported");
	text(id, 10, 10, name);
	CHECK(!strncmp(name, serial, 16), "serial %s", name);
	text(id, 27, 20, name);
	CHECK(!strncmp(name, "VMDKFUSE BDWRAPPER DISK  ", 25), "model %s", name);

	unsigned char command[4 + 2 * 512] = { 0xec, 0, 0, 2 };
	memset(command + 4, 0xee, sizeof command - 4);
	CHECK(ioctl(fd, HDIO_DRIVE_CMD, command) == 0, "IDENTIFY");
	CHECK(command[0] == 0x50 && command[1] == 0, "status %#x", command[0]);
	CHECK(!memcmp(command + 4, id, 512), "both answers are the same");
	CHECK(command[516] == 0 && command[1027] == 0, "a second sector is empty");
	unsigned char one[4] = { 0xec, 0, 0, 0 };
	CHECK(ioctl(fd, HDIO_DRIVE_CMD, one) == -1 && errno == EIO, "IDENTIFY without room");
	for (int other = 0; other < 256; other++) {
		unsigned char registers[4 + 512] = { other, 0, 0, 1 };
		if (other != 0xec)
			CHECK(ioctl(fd, HDIO_DRIVE_CMD, registers) == -1 && errno == EIO, "command %#x", other);
	}
	CHECK(ioctl(fd, HDIO_DRIVE_CMD, NULL) == -1 && errno == EFAULT, "no command");
}

static void geometry(int fd, uint64_t sectors)
{
	struct hd_geometry geometry;
	get(fd, HDIO_GETGEO, &geometry, sizeof geometry);
	CHECK(geometry.heads == 255 && geometry.sectors == 63 && geometry.start == 0, "%d heads", geometry.heads);
	CHECK(geometry.cylinders == least(sectors / (255 * 63), 65535), "%d cylinders", geometry.cylinders);
}

static struct sg_io_hdr header;
static unsigned char sense[32], data[256];

/* Runs a SCSI command; returns its status, or -1. */
static int scsi(int fd, const unsigned char *cdb, int len)
{
	memset(&header, 0, sizeof header);
	memset(sense, 0xee, sizeof sense);
	memset(data, 0xee, sizeof data);
	header.interface_id = 'S';
	header.dxfer_direction = SG_DXFER_FROM_DEV;
	header.cmd_len = len;
	header.mx_sb_len = 20;
	header.dxfer_len = sizeof data;
	header.dxferp = data;
	header.cmdp = (void *)cdb;
	header.sbp = sense;
	header.timeout = 1000;
	header.status = header.info = header.resid = 0x55;
	return ioctl(fd, SG_IO, &header) ? -1 : header.status;
}

#define SCSI(fd, ...) scsi(fd, (unsigned char[16]){ __VA_ARGS__ }, 16)
#define GOT ((int)sizeof data - header.resid)

/* Checks that a command fails with this sense key and code. */
#define REFUSED(fd, key, code, ...)                                                                        \
	do {                                                                                               \
		CHECK(SCSI(fd, __VA_ARGS__) == 2, "status %d", header.status);                             \
		CHECK(header.masked_status == 1 && header.info & SG_INFO_CHECK, "info %#x", header.info); \
		CHECK(header.sb_len_wr == 18 && sense[18] == 0xee, "%d bytes of sense", header.sb_len_wr); \
		CHECK(sense[0] == 0x70 && sense[2] == key && sense[12] == code, "sense %d %#x", sense[2], sense[12]); \
		CHECK(GOT == 0 && data[0] == 0xee, "%d bytes of data", GOT);                              \
	} while (0)

static uint64_t big_endian(const unsigned char *bytes, int len)
{
	uint64_t value = 0;
	while (len--)
		value = value << 8 | *bytes++;
	return value;
}

static void inquiry(int fd, const char *serial)
{
	CHECK(SCSI(fd, 0x12, 0, 0, 0, 255) == 0 && GOT == 36, "%d bytes", GOT);
	CHECK(data[0] == 0 && data[2] == 5 && data[4] == 31, "version %d", data[2]);
	CHECK(!memcmp(data + 8, "VMDKFUSEBDWRAPPER DISK  1.0 ", 28), "%.28s", data + 8);
	CHECK(SCSI(fd, 0x12, 0, 0, 0, 5) == 0 && GOT == 5 && data[5] == 0xee, "allocation length");
	CHECK(SCSI(fd, 0x12, 1, 0, 0, 255) == 0 && GOT == 7 && !memcmp(data + 4, "\0\x80\x83", 3), "VPD 0x00");
	CHECK(SCSI(fd, 0x12, 1, 0x80, 0, 255) == 0 && GOT == 20 && !memcmp(data + 4, serial, 16), "VPD 0x80");
	CHECK(SCSI(fd, 0x12, 1, 0x83, 0, 255) == 0 && GOT == data[3] + 4, "VPD 0x83");
	CHECK(!memcmp(data + 32, serial, 16) && data[52] >> 4 == 3, "designators");
	REFUSED(fd, 5, 0x24, 0x12, 1, 0xb1, 0, 255);
	REFUSED(fd, 5, 0x24, 0x12, 0, 0x80, 0, 255);
}

static void capacity(int fd, uint64_t sectors)
{
	CHECK(SCSI(fd, 0x00) == 0 && GOT == 0, "TEST UNIT READY");
	CHECK(SCSI(fd, 0x25) == 0 && GOT == 8, "READ CAPACITY (10)");
	CHECK(big_endian(data, 4) == least(sectors - 1, 0xffffffff) && big_endian(data + 4, 4) == 512, "capacity");
	CHECK(SCSI(fd, 0x9e, 0x10, [13] = 32) == 0 && GOT == 32, "READ CAPACITY (16)");
	CHECK(big_endian(data, 8) == sectors - 1 && big_endian(data + 8, 4) == 512 && data[13] == 0, "capacity");
	REFUSED(fd, 5, 0x24, 0x25, [5] = 1);
	REFUSED(fd, 5, 0x24, 0x9e, 0x11, [13] = 32);
}

static void modes(int fd, uint64_t sectors, int read_only)
{
	int protected = read_only ? 0x80 : 0;
	CHECK(SCSI(fd, 0x1a, 0, 0x3f, 0, 255) == 0 && GOT == data[0] + 1, "MODE SENSE (6)");
	CHECK(data[2] == protected && data[3] == 8 && big_endian(data + 9, 3) == 512, "header %#x", data[2]);
	CHECK(big_endian(data + 4, 4) == least(sectors, 0xffffffff), "blocks");
	CHECK(SCSI(fd, 0x5a, 0x10, 0x3f, [8] = 255) == 0 && GOT == data[1] + 2, "MODE SENSE (10)");
	CHECK(data[3] == protected && data[4] == 1 && big_endian(data + 8, 8) == sectors, "long blocks");
	CHECK(SCSI(fd, 0x1a, 8, 0x08, 0, 255) == 0 && data[3] == 0 && data[4] == 0x08, "caching");
	CHECK(data[6] & 4, "the write cache is on");
	REFUSED(fd, 5, 0x39, 0x1a, 0, 0xff, 0, 255);
	REFUSED(fd, 5, 0x24, 0x1a, 0, 0x1c, 0, 255);
}

/* Commands with other memory: several parts, none, too little, a wrong address. */
static void transfers(int fd)
{
	unsigned char inquiry[6] = { 0x12, 0, 0, 0, 255 }, first[5], second[40];
	struct iovec parts[3] = { { first, 5 }, { NULL, 0 }, { second, 40 } };
	CHECK(scsi(fd, inquiry, 6) == 0 && GOT == 36, "a CDB of 6 bytes");
	header.iovec_count = 3;
	header.dxferp = parts;
	header.dxfer_len = 45;
	CHECK(ioctl(fd, SG_IO, &header) == 0 && header.resid == 9, "resid %d", header.resid);
	CHECK(!memcmp(first, data, 5) && !memcmp(second, data + 5, 31), "parts");
	header.iovec_count = 0;
	header.dxferp = NULL;
	CHECK(ioctl(fd, SG_IO, &header) == -1 && errno == EFAULT, "no memory");
	header.dxfer_direction = SG_DXFER_NONE;
	header.dxfer_len = 0;
	CHECK(ioctl(fd, SG_IO, &header) == 0 && header.resid == 0, "no data wanted");
	header.cmdp = NULL;
	CHECK(ioctl(fd, SG_IO, &header) == -1 && errno == EFAULT, "no command");
	header.interface_id = 'Q';
	CHECK(ioctl(fd, SG_IO, &header) == -1 && errno == EINVAL, "another interface");
	CHECK(ioctl(fd, SG_IO, NULL) == -1 && errno == EFAULT, "no header");
	unsigned char unknown[6] = { 0x28 };
	scsi(fd, unknown, 6);
	header.sbp = NULL;
	CHECK(ioctl(fd, SG_IO, &header) == 0 && header.status == 2 && header.sb_len_wr == 0, "no room for sense");
}

static void scsi_disk(int fd, uint64_t sectors, int read_only, const char *serial)
{
	struct {
		int four_in_one, host_unique_id;
	} address;
	CHECK(get_int(fd, SG_GET_VERSION_NUM) >= 30000, "version");
	CHECK(get_int(fd, SCSI_IOCTL_GET_BUS_NUMBER) == 0, "bus");
	get(fd, SCSI_IOCTL_GET_IDLUN, &address, sizeof address);
	CHECK(address.four_in_one >> 8 == 0, "address %#x", address.four_in_one);
	inquiry(fd, serial);
	capacity(fd, sectors);
	modes(fd, sectors, read_only);
	transfers(fd);
	CHECK(SCSI(fd, 0xa0, [9] = 255) == 0 && GOT == 16 && data[3] == 8, "REPORT LUNS");
	CHECK(SCSI(fd, 0x03, 0, 0, 0, 255) == 0 && GOT == 18 && data[2] == 0, "REQUEST SENSE");
	CHECK(SCSI(fd, 0x35) == 0, "SYNCHRONIZE CACHE (10)");
	CHECK(SCSI(fd, 0x91) == 0, "SYNCHRONIZE CACHE (16)");
	for (int other = 0; other < 256; other++)
		if (!memchr("\x00\x03\x12\x1a\x5a\x25\x9e\xa0\x35\x91", other, 10))
			REFUSED(fd, 5, 0x20, other);
}

static void ide_disk(int fd)
{
	int value;
	unsigned char inquiry[6] = { 0x12, 0, 0, 0, 255 };
	CHECK(scsi(fd, inquiry, 6) == -1 && errno == EINVAL, "SG_IO");
	CHECK(ioctl(fd, SG_GET_VERSION_NUM, &value) == -1 && errno == EINVAL, "SG_GET_VERSION_NUM");
	CHECK(ioctl(fd, SCSI_IOCTL_GET_IDLUN, &value) == -1 && errno == EINVAL, "SCSI_IOCTL_GET_IDLUN");
	CHECK(ioctl(fd, SCSI_IOCTL_GET_BUS_NUMBER, &value) == -1 && errno == EINVAL, "SCSI_IOCTL_GET_BUS_NUMBER");
}

int main(int count, char **arguments)
{
	if (count != 6)
		return 2;
	uint64_t sectors = strtoull(arguments[3], NULL, 10);
	int is_scsi = !strcmp(arguments[2], "scsi"), read_only = !strcmp(arguments[4], "ro");
	int fd = open(arguments[1], O_RDONLY | O_NONBLOCK);
	CHECK(fd >= 0, "%s", arguments[1]);
	block_layer(fd, sectors, read_only);
	geometry(fd, sectors);
	identify(fd, sectors, arguments[5]);
	if (is_scsi)
		scsi_disk(fd, sectors, read_only, arguments[5]);
	else
		ide_disk(fd);
	int path = open(arguments[1], O_PATH);
	CHECK(path >= 0 && ioctl(path, BLKGETSIZE64, &sectors) == -1 && errno == EBADF, "O_PATH");
	return failures != 0;
}
