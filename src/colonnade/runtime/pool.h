/* pool.h: threads that walk through the same straight line of work, with barriers between its pieces.
 *
 * Threads are created once. cn_team_run starts all of them on one function, the caller being thread 0; the function
 * must end in a barrier, so that everything is done when thread 0 returns. A pool of one thread is a null pointer,
 * and its barrier costs one test.
 */
#ifndef COLONNADE_POOL_H
#define COLONNADE_POOL_H

typedef struct cn_team cn_team;
typedef void cn_work(void *context, unsigned thread, unsigned threads);

/* `threads` >= 2. Returns null when they cannot be had. */
cn_team *cn_team_create(unsigned threads);
void cn_team_run(cn_team *team, cn_work *work, void *context);
void cn_team_barrier(cn_team *team);
void cn_team_destroy(cn_team *team);

/* all threads of `team` (null: the only one) have done what stands before it */
static inline void cn_barrier(cn_team *team)
{
    if (team) cn_team_barrier(team);
}
#endif
