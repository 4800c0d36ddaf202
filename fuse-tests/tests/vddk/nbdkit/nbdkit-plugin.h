/* The only macro of nbdkit's header that its stand-in for VDDK uses. */
#define NBDKIT_DLL_PUBLIC __attribute__ ((visibility ("default")))
