#compdef kncompress
# zsh completion of kncompress. For this shell, after compinit: source <(kncompress completion zsh)
# Candidates come from the program itself, so they are those of the version that the line would start.

_kncompress() {
    local -a call answer
    local marks
    call=("${(Q)words[1]/#\~/$HOME}")
    if [[ ${call[1]:t} == python* ]]; then
        if [[ $words[2] != -m || $words[3] != kncompress ]] || (( CURRENT < 4 )); then
            $_kncompress_python
            return
        fi
        call+=(-m kncompress)
    fi
    answer=("${(@f)$("${(@)call}" completion query "${(@Q)words[$(($#call + 1)),CURRENT-1]}" "$PREFIX" 2> /dev/null)}")
    # The first line says whether names of files complete the word too, and whether a space follows a candidate.
    marks=$answer[1]
    shift answer
    if [[ $marks == *open* ]]; then
        compadd -S '' -a answer
    else
        compadd -a answer
    fi
    [[ $marks == *files* ]] && compset -P '*=' && _files
}

compdef _kncompress kncompress
# python -m kncompress; other words behind python are left to what completed them before.
typeset -g _kncompress_python=${_comps[python]:-_default}
[[ $_kncompress_python == _kncompress ]] && _kncompress_python=_default
compdef _kncompress python python3
