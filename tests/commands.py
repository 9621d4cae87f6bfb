"""Commands as a user types them, in this process."""

from typer.testing import CliRunner

from fastalign.cli.main import app


def fastalign(*arguments):
    """Run a command -> (exit code, stdout, stderr)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments):
    """The one line that a mistake gives."""
    code, _, err = fastalign(*arguments)
    assert code == 1, err
    assert err.startswith("fastalign: ") and err.count("\n") == 1, err
    return err
