/* Calls the stand-in library through the public interface of VDDK, with structures that are filled and read by the byte
   offsets of the notes about that interface, not by any declaration of this project.

   Usage: layout LIBRARY DISK NEW_DISK. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AT(type, base, offset) (*(type *) ((char *) (base) + (offset)))
#define CHECK(condition) \
  do { if (!(condition)) { fprintf (stderr, "line %d: %s\n", __LINE__, #condition); exit (1); } } while (0)

static void *library;

static void *
function (const char *name)
{
  void *found = dlsym (library, name);
  if (found == NULL) {
    fprintf (stderr, "%s is missing\n", name);
    exit (1);
  }
  return found;
}

static uint64_t done = ~0ull;

static void
completed (void *data, uint64_t result)
{
  CHECK (data == &done);
  done = result;
}

int
main (int argc, char **argv)
{
  CHECK (argc == 4);
  library = dlopen (argv[1], RTLD_NOW);
  if (library == NULL) {
    fprintf (stderr, "%s\n", dlerror ());
    return 1;
  }
  uint64_t (*init) (uint32_t, uint32_t, void *, void *, void *, const char *, const char *) =
    function ("VixDiskLib_InitEx");
  /* NULL log functions are accepted. */
  CHECK (init (6, 5, NULL, NULL, NULL, NULL, NULL) == 0);

  char *(*error_text) (uint64_t, const char *) = function ("VixDiskLib_GetErrorText");
  void (*free_error_text) (char *) = function ("VixDiskLib_FreeErrorText");
  char *text = error_text (14009, NULL);
  CHECK (strstr (text, "14009") != NULL);
  free_error_text (text);

  void *(*allocate) (void) = function ("VixDiskLib_AllocateConnectParams");
  void (*free_params) (void *) = function ("VixDiskLib_FreeConnectParams");
  void *params = allocate ();
  AT (char *, params, 0) = "moref=vm-1";
  AT (char *, params, 8) = "server";
  AT (char *, params, 16) = "thumb";
  AT (uint32_t, params, 32) = 2;       /* SESSIONID */
  AT (char *, params, 40) = "cookie";
  AT (char *, params, 48) = "user";
  AT (char *, params, 56) = "key";
  AT (uint32_t, params, 64) = 443;
  AT (uint32_t, params, 68) = 902;
  AT (char *, params, 96) = "store";
  AT (char *, params, 104) = "folder";
  AT (uint32_t, params, 120) = 0;      /* VMX */
  uint64_t (*connect) (const void *, char, const char *, const char *, void **) = function ("VixDiskLib_ConnectEx");
  uint64_t (*disconnect) (void *) = function ("VixDiskLib_Disconnect");
  void *connection;
  CHECK (connect (params, 1, "snap", "nbd", &connection) == 0);
  CHECK (disconnect (connection) == 0);
  AT (char *, params, 0) = NULL;
  AT (uint32_t, params, 120) = 2;      /* DATASTORE */
  CHECK (connect (params, 1, NULL, NULL, &connection) == 0);
  CHECK (disconnect (connection) == 0);
  memset (params, 0, 128);
  CHECK (connect (params, 0, NULL, NULL, &connection) == 0);
  free_params (params);

  char create_params[32];
  memset (create_params, 0, sizeof create_params);
  AT (uint32_t, create_params, 0) = 7;
  AT (uint32_t, create_params, 4) = 3;
  AT (uint16_t, create_params, 8) = 13;
  AT (uint64_t, create_params, 16) = 4096;
  uint64_t (*create) (void *, const char *, const void *, void *, void *) = function ("VixDiskLib_Create");
  CHECK (create (connection, argv[3], create_params, NULL, NULL) == 0);

  uint64_t (*open) (void *, const char *, uint32_t, void **) = function ("VixDiskLib_Open");
  void *handle;
  CHECK (open (connection, argv[2], 0, &handle) == 0);
  uint64_t (*get_info) (void *, void **) = function ("VixDiskLib_GetInfo");
  void (*free_info) (void *) = function ("VixDiskLib_FreeInfo");
  void *info;
  CHECK (get_info (handle, &info) == 0);
  CHECK (AT (uint64_t, info, 24) == 2048);     /* capacity in sectors */
  CHECK (AT (uint32_t, info, 32) == 3);        /* adapterType */
  CHECK (AT (int32_t, info, 36) == 1);         /* numLinks */
  CHECK (AT (uint32_t, info, 56) == 512);      /* logicalSectorSize */
  CHECK (AT (uint32_t, info, 60) == 4096);     /* physicalSectorSize */
  free_info (info);

  unsigned char buffer[1024];
  uint64_t (*read_async) (void *, uint64_t, uint64_t, unsigned char *, void (*) (void *, uint64_t), void *) =
    function ("VixDiskLib_ReadAsync");
  CHECK (read_async (handle, 1, 2, buffer, completed, &done) == 25000);
  uint64_t (*wait) (void *) = function ("VixDiskLib_Wait");
  uint64_t (*flush) (void *) = function ("VixDiskLib_Flush");
  CHECK (wait (handle) == 0 && done == 0);
  CHECK (buffer[0] == 1 && buffer[512] == 2);
  CHECK (flush (handle) == 0);

  uint64_t (*query) (void *, uint64_t, uint64_t, uint64_t, void **) = function ("VixDiskLib_QueryAllocatedBlocks");
  uint64_t (*free_list) (void *) = function ("VixDiskLib_FreeBlockList");
  void *list;
  CHECK (query (handle, 0, 2048, 128, &list) == 0);
  CHECK (AT (uint32_t, list, 0) == 1);         /* numBlocks */
  CHECK (AT (uint64_t, list, 8) == 0 && AT (uint64_t, list, 16) == 2048);
  free_list (list);
  CHECK (query (handle, 0, 2049, 128, &list) == 3);

  uint64_t (*close) (void *) = function ("VixDiskLib_Close");
  CHECK (wait (handle) == 0 && close (handle) == 0);
  CHECK (disconnect (connection) == 0);
  void (*end) (void) = function ("VixDiskLib_Exit");
  end ();
  return 0;
}
