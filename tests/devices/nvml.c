/* A stand-in for NVIDIA's library: two GPUs, one of which does not tell its power. */
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long used; unsigned a, b; } Process;
static int gpus[2] = {0, 1};
static const char *uuids[2] = {"GPU-aaaa1111-0000", "GPU-bbbb2222-0000"};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &gpus[index]; return index > 1; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  for (int i = 0; i < 2; i++) if (!strcmp(uuid, uuids[i])) { *device = &gpus[i]; return 0; }
  return 2;
}
int nvmlDeviceGetUUID(void *device, char *name, unsigned length) { strncpy(name, uuids[*(int *)device], length); return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned length) { strncpy(name, "NVIDIA H200", length); return *(int *)device; }
int nvmlDeviceGetMigMode(void *device, unsigned *mode, unsigned *pending) { *mode = *pending = *(int *)device; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, Memory *m) { m->total = 8ull << 30; m->used = 3ull << 30; m->free = 5ull << 30; return 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) { *mw = 250500; return *(int *)device ? 3 : 0; }
int nvmlDeviceGetTemperature(void *device, int kind, unsigned *t) { *t = 61; return kind; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process *found) {
  unsigned there = *(int *)device ? 0 : 2, room = *count;
  *count = there;
  if (room < there) return 7;
  for (unsigned i = 0; i < there; i++) { found[i].pid = 100 + i; found[i].used = (i ? ~0ull : 2ull << 30); }
  return 0;
}
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, "580.159.04", length); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13010; return 0; }
int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *up) { *up = link < 17; return link < 18 ? 0 : 2; }
int nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *generation) { *generation = 5; return 0; }
int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *width) { *width = 16; return *(int *)device ? 3 : 0; }
