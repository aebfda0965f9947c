/* The part of QEMU's TCG plugin interface that the instrument uses. PLUGIN_API: its version, which the emulator checks:
 * 1 (QEMU 6 to 8), 2 (9.0), 3 (9.1 and later, which take it although theirs is newer).
 *
 * Debian ships the plugin-capable emulator without its header; these are declarations of the documented interface,
 * resolved by the emulator when it loads the plugin.
 */
#ifndef COLONNADE_QEMU_PLUGIN_H
#define COLONNADE_QEMU_PLUGIN_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef PLUGIN_API
#define PLUGIN_API 1
#endif

#define IMPORTED __attribute__((weak))
#define PLUGIN_EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct plugin_info; /* what the emulator says of itself: not needed */

enum plugin_registers { PLUGIN_NO_REGISTERS, PLUGIN_READS_REGISTERS, PLUGIN_WRITES_REGISTERS };
enum plugin_access { PLUGIN_READ = 1, PLUGIN_WRITE, PLUGIN_READ_WRITE };

typedef void plugin_translated(plugin_id, struct qemu_plugin_tb *);
typedef void plugin_executed(unsigned cpu, void *data);
typedef void plugin_accessed(unsigned cpu, uint32_t access, uint64_t address, void *data);
typedef void plugin_called(plugin_id, unsigned cpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                           uint64_t, uint64_t, uint64_t);
typedef void plugin_returned(plugin_id, unsigned cpu, int64_t number, int64_t result);
typedef void plugin_ended(plugin_id, void *data);

/* weak: the emulator has them, the linker need not */
#pragma GCC visibility push(default)
IMPORTED void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, plugin_translated *);
IMPORTED void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, plugin_executed *, enum plugin_registers, void *);
IMPORTED void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, plugin_accessed *, enum plugin_registers,
                                      enum plugin_access, void *);
IMPORTED void qemu_plugin_register_vcpu_syscall_cb(plugin_id, plugin_called *);
IMPORTED void qemu_plugin_register_vcpu_syscall_ret_cb(plugin_id, plugin_returned *);
IMPORTED void qemu_plugin_register_atexit_cb(plugin_id, plugin_ended *, void *);
IMPORTED size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
IMPORTED struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
#if PLUGIN_API < 3
IMPORTED const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
#else
IMPORTED size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *, void *to, size_t most);
#endif
IMPORTED size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
IMPORTED uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
IMPORTED unsigned qemu_plugin_mem_size_shift(uint32_t access);
IMPORTED bool qemu_plugin_mem_is_store(uint32_t access);
#pragma GCC visibility pop
#endif
