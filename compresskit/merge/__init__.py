"""Several task vectors become one."""
