"""``python -m launch.child train ...`` is ``mixcon train ...``, but it saves and stops when its launcher dies."""

from launch.processes import end_with_launcher

if __name__ == '__main__':
    end_with_launcher()
    from mixcon_jax.cli import main

    main()
